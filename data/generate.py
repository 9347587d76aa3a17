"""Write the demo data: a corpus, prompts, demonstrations and preferences about an invented town.

    python data/generate.py            write the files beside this script
    python data/generate.py --check    exit with 1 unless the files there are what it would write

Everything is drawn from one seed with the standard library's generator, so equal seeds give equal files on
every platform.  What the world is and what the files are for is in README.md beside this script.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that it also runs where the package is not installed

from rlhf_ray.evaluation import demo_world as world  # noqa: E402
from rlhf_ray.evaluation.demo_judge import BRIEF, CORRECT, POLITE  # noqa: E402
from rlhf_ray.evaluation.demo_world import TOPICS, Topic, fill  # noqa: E402

CORPUS_LINES = 22_000
SFT_ROWS = 6_000
PAIRS = 6_000
PROMPTS = 2_000
HELD_OUT_WHOLE, HELD_OUT_LATER = 180, 76
FLIPPED = 0.10
GOOD_VALUE, POLITE_SHARE, RUDE_SHARE, BRIEF_SHARE = 0.70, 0.50, 0.25, 0.50


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt and what it asks; ``final`` is the last user turn, asked in one of a few ways."""

    topic: Topic
    subject: str
    way: str
    """How it is asked: whole, follow, switch or own."""
    final: str
    before: tuple[tuple[str, str], ...] = ()
    """Turns before the last: (role, content)."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What is held out: this question of this subject, asked in this way and form."""
        return (self.way, self.topic.name, self.subject, self.final)

    def prompt(self) -> str | list[dict[str, str]]:
        """Text where the prompt is a single turn, else messages."""
        if not self.before:
            return self.final
        turns = (*self.before, ("user", self.final))
        return [{"role": role, "content": content} for role, content in turns]


@dataclass(frozen=True, slots=True)
class Style:
    """The three axes on which answers differ."""

    correct: bool
    manner: str
    """polite, plain or rude."""
    brief: bool

    @property
    def score(self) -> float:
        """The stated rule of the preferences."""
        return CORRECT * self.correct + POLITE * (self.manner == "polite") + BRIEF * self.brief


# ---- questions


def whole_questions() -> list[Ask]:
    """Every question of every subject in every form."""
    return [
        Ask(topic, subject, "whole", fill(form, subject))
        for topic in TOPICS.values()
        for subject in topic.values
        for form in topic.questions
    ]


def later_questions() -> list[Ask]:
    """Every question that needs the turns before it, those turns still to be chosen."""
    asks = []
    for topic in TOPICS.values():
        for subject in topic.values:
            asks += [Ask(topic, subject, "follow", fill(form, subject)) for form in topic.follow_ups]
            asks += [Ask(topic, subject, "own", fill(form, subject)) for form in topic.own]
            if topic.follow_ups:
                asks += [Ask(topic, subject, "switch", fill(form, subject)) for form in world.SWITCHES]
    return asks


def with_context(rng: random.Random, ask: Ask, whole: dict[tuple[str, str], list[Ask]]) -> Ask:
    """Choose the turns before a later question; the questions among them are whole ones from training."""
    if ask.way == "own":
        return Ask(ask.topic, ask.subject, ask.way, ask.final, (("system", fill(world.SPEAKER, ask.subject)),))
    topic, subject = ask.topic, ask.subject
    if ask.way == "follow":
        related = [t for t in TOPICS.values() if subject in t.values and t is not topic and t.follow_ups]
        topic = rng.choice(related)
    else:
        subject = rng.choice([other for other in topic.values if other != subject])
    first = rng.choice(whole[topic.name, subject])
    reply = fill(topic.answers[0], subject, topic.values[subject])
    turns: tuple[tuple[str, str], ...] = (("user", first.final), ("assistant", reply))
    return Ask(ask.topic, ask.subject, ask.way, ask.final, guided(rng, turns, 0.5))


def guided(rng: random.Random, turns: tuple[tuple[str, str], ...], share: float) -> tuple[tuple[str, str], ...]:
    """Open a share of the conversations with a system prompt that changes nothing."""
    return (("system", rng.choice(world.GUIDES)), *turns) if rng.random() < share else turns


def hold_out(rng: random.Random, asks: list[Ask], count: int, seen: int) -> tuple[list[Ask], list[Ask]]:
    """Split into (training, held out): at most one form of a question, and ``seen`` or more remain."""
    forms: dict[tuple[str, str, str], list[Ask]] = {}
    for ask in asks:
        forms.setdefault(ask.key[:3], []).append(ask)
    open_to_it = [key for key, members in forms.items() if len(members) > seen]
    held = [rng.choice(forms[key]) for key in rng.sample(open_to_it, count)]
    keys = {ask.key for ask in held}
    return [ask for ask in asks if ask.key not in keys], held


# ---- answers


def wrong_value(rng: random.Random, ask: Ask) -> str:
    """A wrong value of the right kind: another subject's, or a near number for sums."""
    right = ask.topic.values[ask.subject]
    if ask.topic.name in ("sum", "difference"):
        near = [int(right) + off for off in (-3, -2, -1, 1, 2, 3)]
        return str(rng.choice([n for n in near if n > 0]))
    return rng.choice(sorted(set(ask.topic.values.values()) - {right, ask.subject}))


def answer(rng: random.Random, ask: Ask, style: Style) -> str:
    """An answer of the given style."""
    value = ask.topic.values[ask.subject] if style.correct else wrong_value(rng, ask)
    parts = [fill(rng.choice(ask.topic.answers), ask.subject, value)]
    if not style.brief:
        before, after = rng.sample(world.FILLERS, 2)
        parts = rng.choice(([before, *parts], [*parts, after], [before, *parts, after]))
    if style.manner == "plain":
        return " ".join(parts)
    polite = style.manner == "polite"
    if rng.random() < 0.5:
        return " ".join((rng.choice(world.OPENINGS if polite else world.RUDE_OPENINGS), *parts))
    return " ".join((*parts, rng.choice(world.CLOSINGS if polite else world.RUDE_CLOSINGS)))


def a_style(rng: random.Random) -> Style:
    """The mixture of the demonstrations."""
    manner, brief = a_manner(rng), rng.random() < BRIEF_SHARE
    return Style(rng.random() < GOOD_VALUE, manner, brief)


def a_manner(rng: random.Random) -> str:
    weights = (POLITE_SHARE, RUDE_SHARE, 1 - POLITE_SHARE - RUDE_SHARE)
    return rng.choices(("polite", "rude", "plain"), weights)[0]


def two_styles(rng: random.Random) -> tuple[Style, Style]:
    """A better and a worse style: they differ in one axis, mostly correctness, or in several."""
    one = a_style(rng)
    axis = rng.choices(("correct", "manner", "brief", "any"), (0.4, 0.1, 0.1, 0.4))[0]
    match axis:
        case "correct":
            pair = (Style(True, one.manner, one.brief), Style(False, one.manner, one.brief))
        case "manner":
            other = rng.choice(("plain", "rude"))
            pair = (Style(one.correct, "polite", one.brief), Style(one.correct, other, one.brief))
        case "brief":
            pair = (Style(one.correct, one.manner, True), Style(one.correct, one.manner, False))
        case _:
            two = a_style(rng)
            while two.score == one.score:
                two = a_style(rng)
            pair = (one, two) if one.score > two.score else (two, one)
    return pair


# ---- files


def corpus(rng: random.Random, asks: Sequence[Ask]) -> Iterator[list[str]]:
    """Documents of a few lines each: true sentences about one subject or skill, true conversations."""
    town = [*world.PLACES, *world.PEOPLE]
    skills = world.SKILL_TOPICS
    while True:
        kind = rng.random()
        if kind < 0.35:
            subject = rng.choice(town)
            topics = [topic for topic in TOPICS.values() if subject in topic.values]
            chosen = rng.sample(topics, rng.randint(3, 5))
            yield [statement(rng, topic, subject) for topic in chosen]
        elif kind < 0.55:
            topic = rng.choices(skills, [len(topic.values) for topic in skills])[0]
            chosen_subjects = rng.sample(sorted(topic.values), 4)
            yield [statement(rng, topic, subject) for subject in chosen_subjects]
        else:
            yield conversation(rng, rng.sample(asks, 2))


def statement(rng: random.Random, topic: Topic, subject: str) -> str:
    """One true sentence that names its subject."""
    forms = [form for form in (*topic.answers, *topic.statements) if "{x}" in form]
    return fill(rng.choice(forms), subject, topic.values[subject])


def conversation(rng: random.Random, asks: Sequence[Ask]) -> list[str]:
    """Two questions and their true answers, in one of the ways to write speech down."""
    speakers = rng.choice((("Visitor", "Guide"), ("Question", "Answer"), ("Child", "Teacher"), None))
    lines = []
    for ask in asks:
        manner = rng.choices(("plain", "polite", "rude"), (0.7, 0.2, 0.1))[0]
        reply = answer(rng, ask, Style(True, manner, rng.random() < 0.9))
        if speakers is None:
            lines += [f'"{ask.final}" asks a visitor.', f'"{reply}" says the guide.']
        else:
            lines += [f"{speakers[0]}: {ask.final}", f"{speakers[1]}: {reply}"]
    return lines


def corpus_text(rng: random.Random, asks: Sequence[Ask]) -> str:
    """Documents with a blank line after each, CORPUS_LINES lines of text or a few more."""
    documents, lines = [], 0
    for document in corpus(rng, asks):
        documents.append("\n".join(document))
        lines += len(document)
        if lines >= CORPUS_LINES:
            break
    return "\n\n".join(documents) + "\n"


def json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(", ", ": ")) + "\n"


def prompt_line(ask: Ask) -> str:
    prompt = ask.prompt()
    return f"{prompt}\n" if isinstance(prompt, str) else json_line({"messages": prompt})


def pair_rows(rng: random.Random, pool: Sequence[Ask]) -> list[dict[str, Any]]:
    """Pairs that follow the rule, then exactly FLIPPED of them turned round."""
    rows = []
    for ask in draws(rng, pool, PAIRS):
        better, worse = two_styles(rng)
        rows.append((ask.prompt(), answer(rng, ask, better), answer(rng, ask, worse)))
    flipped = set(rng.sample(range(PAIRS), round(FLIPPED * PAIRS)))
    return [
        {"prompt": prompt, "chosen": worse, "rejected": better}
        if index in flipped
        else {"prompt": prompt, "chosen": better, "rejected": worse}
        for index, (prompt, better, worse) in enumerate(rows)
    ]


def draws(rng: random.Random, pool: Sequence[Ask], count: int) -> list[Ask]:
    """``count`` prompts, every prompt of the pool about equally often."""
    drawn: list[Ask] = []
    while len(drawn) < count:
        drawn += rng.sample(pool, len(pool))
    return drawn[:count]


def generate(seed: int = 0) -> dict[str, str]:
    """Every file's text by its path below this folder."""
    rng = random.Random(seed)
    whole, whole_out = hold_out(rng, whole_questions(), HELD_OUT_WHOLE, seen=2)
    later, later_out = hold_out(rng, later_questions(), HELD_OUT_LATER, seen=1)
    by_fact: dict[tuple[str, str], list[Ask]] = {}
    for ask in whole:
        by_fact.setdefault((ask.topic.name, ask.subject), []).append(ask)
    held_out = [Ask(a.topic, a.subject, a.way, a.final, guided(rng, (), 0.2)) for a in whole_out]
    held_out += [with_context(rng, ask, by_fact) for ask in later_out]
    pool = [Ask(a.topic, a.subject, a.way, a.final, guided(rng, (), 0.15)) for a in whole]
    pool += [with_context(rng, ask, by_fact) for ask in later]
    prompts = rng.sample(pool, min(PROMPTS, len(pool)))
    sft = [(ask, answer(rng, ask, a_style(rng))) for ask in draws(rng, pool, SFT_ROWS)]
    pairs = pair_rows(rng, pool)
    return {
        "raw/pretrain_corpus.txt": corpus_text(rng, whole),
        "raw/prompts.txt": "".join(map(prompt_line, prompts)),
        "raw/prompts_heldout.txt": "".join(map(prompt_line, rng.sample(held_out, len(held_out)))),
        "sft/sft_dataset.jsonl": "".join(json_line({"prompt": ask.prompt(), "response": reply}) for ask, reply in sft),
        "preferences/pairs.jsonl": "".join(map(json_line, pairs)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the files; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the demo data beside this script.")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other rows of the same world")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write below")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args(argv)
    stale = []
    for name, text in generate(args.seed).items():
        path, data = args.output / name, text.encode()
        if args.check:
            if not path.is_file() or path.read_bytes() != data:
                stale.append(name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            print(f"{path}: {text.count(chr(10))} lines, {len(data):,} bytes")
    if stale:
        print(f"not what the generator writes: {', '.join(stale)}; run python data/generate.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
