"""What the lint says: complaints in plain sentences, tables for the command line, two lines before a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median

from rlhf_ray import console
from rlhf_ray.data.lint import Facts, Ruler, kind_of, look_at

BRIEF_ROWS, BRIEF_SECONDS = 2000, 0.5
"""How much of each file is looked at before a stage."""
HELD_OUT = ("heldout", "held_out", "held-out", "test", "valid", "eval", "dev")
"""What is in the name of a file that others should have no prompt in common with."""


def stops(facts: Facts, max_bad_rows: int = 0) -> list[str]:
    """Why a stage that reads the file would end with an error."""
    if len(facts.bad) > max_bad_rows:
        more = f" (and {len(facts.bad) - 1} more)" if len(facts.bad) > 1 else ""
        return [f"{_rows(len(facts.bad))} can't be used, and max_bad_rows is {max_bad_rows}: {facts.bad[0]}{more}"]
    return [] if facts.rows else [f"{facts.path} holds no rows"]


def complaints(facts: Facts, ruler: Ruler) -> list[str]:
    """What would harm a stage without stopping it."""
    n, said = max(facts.rows, 1), []
    if facts.duplicates > 0.01 * n:
        said.append(f"{_share(facts.duplicates, n)} repeat a row before them, and count twice")
    if facts.too_long > 0.01 * n:
        said.append(f"{_share(facts.too_long, n)} are longer than {ruler.limit} tokens, and are cut or dropped")
    if facts.equal:
        said.append(f"in {_share(facts.equal, n)} chosen equals rejected: nothing can be learned from them")
    if facts.unlike >= 50 and not 0.4 <= facts.longer_share <= 0.6:
        longer, share = max(("longer", facts.longer_share), ("shorter", 1 - facts.longer_share), key=lambda x: x[1])
        said.append(
            f"the {longer} response is the chosen one in {share:.0%} of the pairs that differ in it: a reward model "
            "that only measures length is right as often"
        )
    for fault, numbers in facts.faults.items():
        said.append(f"{fault} in {_share(len(numbers), n)}, first in {facts.path.name}:{numbers[0]}")
    return said


def overlaps(files: Sequence[Facts]) -> list[tuple[Facts, Facts, int]]:
    """Pairs of files that have prompts in common, and how many different ones."""
    both = [(one, other, len(one.prompts.keys() & other.prompts.keys())) for one, other in combinations(files, 2)]
    return [pair for pair in both if pair[2]]


def leaks(files: Sequence[Facts]) -> list[str]:
    """Prompts that a file of held-out rows, by its name, has in common with another."""
    said = []
    for one, other, common in overlaps(files):
        for held_out, training in ((one, other), (other, one)):
            if _is_held_out(held_out) and not _is_held_out(training):
                said.append(
                    f"{common} of {len(held_out.prompts)} prompts of {held_out.path.name} are in {training.path.name}: "
                    "what is measured on them says little about new ones"
                )
    return said


def _is_held_out(facts: Facts) -> bool:
    return any(word in facts.path.name.lower() for word in HELD_OUT)


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _share(count: int, of: int) -> str:
    return f"{_rows(count)} ({count / of:.1%})"


def brief(
    paths: Iterable[Path], kind: str, ruler: Ruler, say: Callable[[str], object], *, most: int = BRIEF_ROWS
) -> None:
    """Say in a line or two what a stage is about to read, by a quick look at the beginning of each file.

    A file that can't be read is left to the stage, whose error says more.
    """
    for path in paths:
        if not path.is_file():
            continue
        try:
            facts = look_at(path, kind, ruler, most=most, seconds=BRIEF_SECONDS)
        except ValueError:
            continue
        if not facts.rows:
            continue
        lengths = ", ".join(f"{name} {median(values):g}" for name, values in facts.lengths.items())
        looked = "" if facts.complete else "the first "
        say(f"lint: {path.name}: {looked}{_rows(facts.rows)} of {kind}; {ruler.unit} at the median: {lengths}")
        found = stops(facts) + complaints(facts, ruler)
        if found:
            say(f"lint: {path.name}: {'; '.join(found)} (python launch/data.py check says more)")


def show(files: Sequence[Facts], ruler: Ruler, max_bad_rows: int) -> bool:
    """Print tables and sentences; whether all files can be used."""
    console.table(
        "files",
        ("file", "kind", "rows", "bad", "repeated rows", "prompts", "longer is chosen"),
        [
            (
                *(f.path.name, f.kind, f.rows, len(f.bad), f.duplicates, len(f.prompts) or "-"),
                f"{f.longer_share:.0%}" if f.unlike else "-",
            )
            for f in files
        ],
    )
    console.table(
        f"\nlengths in {ruler.unit}",
        ("file", "part", "shortest", "median", "95 %", "longest"),
        [(f.path.name, name, *_quantiles(values)) for f in files for name, values in f.lengths.items()],
    )
    if common := overlaps(files):
        console.table(
            "\nprompts in common",
            ("file", "and", "prompts", "of the first's", "of the second's"),
            [
                (a.path.name, b.path.name, n, f"{n / len(a.prompts):.1%}", f"{n / len(b.prompts):.1%}")
                for a, b, n in common
            ],
        )
    console.say("")
    fatal = [(f, said) for f in files for said in stops(f, max_bad_rows)]
    harmful = [(f, said) for f in files for said in complaints(f, ruler)]
    for facts, said in fatal:
        console.say(f"stops a stage: {facts.path.name}: {said}")
    for facts, said in harmful:
        console.say(f"look at: {facts.path.name}: {said}")
    for said in leaks(files):
        console.say(f"look at: {said}")
    if not (fatal or harmful or leaks(files)):
        console.say("nothing to complain about")
    return not fatal


def _quantiles(values: Sequence[int]) -> tuple[int, int, int, int]:
    ordered = sorted(values)
    return tuple(ordered[round(q * (len(ordered) - 1))] for q in (0.0, 0.5, 0.95, 1.0))  # type: ignore[return-value]


def check(paths: Sequence[Path], kind: str | None, ruler: Ruler, *, most: int, max_bad_rows: int) -> bool:
    """Look at files, all of their rows or the first ``most``, and print what there is to say; whether all can be used.

    Raises ValueError when a file can't be read or its kind can't be told.
    """
    return show([look_at(path, kind or kind_of(path), ruler, most=most) for path in paths], ruler, max_bad_rows)
