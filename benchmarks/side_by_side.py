"""What the benchmarks share: two or more programs measured in turn, and how the outcome is told.

A round calls every side once, so a machine that slows down slows them alike; a ratio is the median of the rounds'
ratios, with the lowest and the highest.  Everything goes to standard output as Markdown and, when asked, to a JSON
file.

Left out on purpose: significance tests; the spread shows whether one is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from machine import BUSY_CORES, Limits, busy_cores, describe, measure_limits, synchronise

Row = dict[str, Any]
PEER_REQUIREMENTS = "benchmarks/requirements.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A median with its extremes."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"x{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """Median, lowest and highest."""
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times as fast the first is as the second: their seconds over ours, round by round."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def best(times: Mapping[str, Sequence[float]], side: str) -> str:
    """Of the names that begin with the side's, the one with the shortest median."""
    return min((name for name in times if name.startswith(side)), key=lambda name: statistics.median(times[name]))


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def interleave(sides: Mapping[str, Callable[[], object]], *, repetitions: int) -> dict[str, list[float]]:
    """Seconds of every side in every round; one round before them is not counted."""
    for call in sides.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, call in sides.items():
            times[name].append(seconds(call))
    return times


def words(text: str) -> list[str]:
    """An argparse type: words with commas between them."""
    return text.split(",")


def numbers(text: str) -> list[int]:
    """An argparse type: whole numbers with commas between them."""
    return [int(word) for word in text.split(",")]


def parser(description: str | None, *, repetitions: int = 3) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads of each side")
    made.add_argument("--repetitions", type=int, default=repetitions, help="rounds that are counted")
    made.add_argument("--quick", action="store_true", help="the smallest sizes, to see that it runs")
    made.add_argument("--even-if-busy", action="store_true", help="measure although others use the machine")
    made.add_argument("--json", type=Path, help="where to write the figures")
    return made


def shrink(options: argparse.Namespace, **small: Any) -> None:
    """With --quick, put the small values in place."""
    if options.quick:
        vars(options).update(small)


class Report:
    """Collects rows, and says them as Markdown and JSON.

    Made after the options are known and before anything is measured: it sets the threads, and ends the program when
    the machine is busy.
    """

    def __init__(self, name: str, options: argparse.Namespace, *, limits: Sequence[str] = ()) -> None:
        """``limits`` names the dtypes whose products are timed; none leaves the limits out."""
        self.options = options
        torch.set_num_threads(options.threads)
        busy = busy_cores()
        if busy > BUSY_CORES:
            text = f"others use {busy:.2f} cores: figures taken now are wrong"
            if not (options.quick or options.even_if_busy):
                raise SystemExit(f"error: {text}; wait until they are done, or insist with --even-if-busy")
            print(f"warning: {text}", file=sys.stderr, flush=True)
        self.limits: Limits | None = measure_limits(list(limits), quick=options.quick) if limits else None
        chosen = {key: value for key, value in vars(options).items() if key not in ("json", "side")}
        self.content: dict[str, Any] = {
            "benchmark": name,
            "options": json.loads(json.dumps(chosen, default=str)),
            "machine": describe() | {"busy_cores": round(busy, 2)},
            "limits": asdict(self.limits) if self.limits else None,
            "rows": [],
        }
        facts = ", ".join(f"{key} {value}" for key, value in self.content["machine"].items())
        print(f"## {name}\n\n{facts}" + (f"\n\nlimits: {self.limits}" if self.limits else ""), flush=True)

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Print rows under their common keys, and keep them for the JSON file."""
        self.content["rows"] += [{"table": title, **{key: _plain(cell) for key, cell in row.items()}} for row in rows]
        lines = [list(rows[0]), ["---"] * len(rows[0]), *([_text(cell) for cell in row.values()] for row in rows)]
        print(f"\n### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)

    def close(self) -> None:
        """Write the JSON file, when asked for."""
        if self.options.json:
            self.options.json.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")


def _plain(cell: object) -> object:
    return asdict(cell) if isinstance(cell, Spread) else cell


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return "-" if cell is None else str(cell)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A program that ran to its end."""

    output: str
    peak_mb: int
    """Largest resident memory of the program itself, in MiB; its children do not count."""

    @property
    def line(self) -> dict[str, Any]:
        """Its last line of output, which is JSON."""
        found: dict[str, Any] = json.loads(self.output.strip().splitlines()[-1])
        return found


def run_program(command: Sequence[str]) -> Finished:
    """Run a program of its own and wait for it; when it fails, end this one with the last lines of its errors."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=REPOSITORY)
        assert process.stdout is not None
        with process.stdout:
            output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # unlike wait, it tells the memory
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            lines = "".join(errors.readlines()[-15:])
            raise SystemExit(f"{lines}error: exit code {process.returncode} from {' '.join(command)}")
    return Finished(output=output, peak_mb=usage.ru_maxrss // 1024)


def check_peer(python: str, modules: Sequence[str]) -> None:
    """End the program, saying what to install, unless the interpreter can import the modules."""
    asked = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, {list(modules)!r})))"
    if subprocess.run([python, "-c", asked], check=False).returncode:
        raise SystemExit(
            f"error: {python} has not all of {', '.join(modules)}: install {PEER_REQUIREMENTS} into a virtual "
            "environment of its own and give its interpreter with --peer-python"
        )
