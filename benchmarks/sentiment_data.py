"""Sentiment data from film reviews: what the pipeline trains on, and what only the outside judge sees.

    python benchmarks/sentiment_data.py --reviews imdb_train.jsonl.gz --output data/imdb --seed 0

The reviews (one JSON object a line: ``label`` pos or neg, ``text``) are split once, by review: 60 % to train
on, 10 % whose openings are the held-out prompts, 30 % for the judge.  Written into the output folder:

- ``pretrain.jsonl``          {text}: the training reviews, whole
- ``sft.jsonl``               {prompt, response}: an opening and how that very review goes on
- ``pairs.jsonl``             {prompt, chosen, rejected}: an opening, pieces of a positive and a negative one
- ``prompts.jsonl``           {prompt}: openings of training reviews
- ``prompts_heldout.jsonl``   {prompt}: openings of held-out reviews
- ``judge.jsonl``             {label, text}: the judge's reviews

The two pieces of a pair come from the middle of two other reviews, so the opening tells nothing about which
is which.  Left out on purpose: neutral reviews (the corpus has none) and any cleaning but of line-break tags.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPENING_WORDS = (8, 12)
PIECE_WORDS = (20, 36)
TRAIN_SHARE, HELD_OUT_SHARE = 0.6, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """One film review."""

    words: tuple[str, ...]
    positive: bool

    @property
    def text(self) -> str:
        """The review in one line."""
        return " ".join(self.words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Reviews by use, disjoint by text."""

    train: list[Review]
    held_out: list[Review]
    judge: list[Review]


def clean(text: str) -> str:
    """The text without line-break tags, its white space single."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


def read_reviews(path: Path) -> list[Review]:
    """Every different review that is long enough for an opening and a piece, in file order."""
    seen: set[str] = set()
    reviews = []
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            text = clean(row["text"])
            words = tuple(text.split())
            if text not in seen and len(words) >= OPENING_WORDS[1] + PIECE_WORDS[1]:
                seen.add(text)
                reviews.append(Review(words=words, positive=row["label"] == "pos"))
    return reviews


def split(reviews: list[Review], seed: int) -> Splits:
    """60 % to train on, 10 % for held-out prompts, the rest for the judge."""
    order = list(reviews)
    random.Random(f"split {seed}").shuffle(order)
    train, held_out = int(TRAIN_SHARE * len(order)), int((TRAIN_SHARE + HELD_OUT_SHARE) * len(order))
    return Splits(train=order[:train], held_out=order[train:held_out], judge=order[held_out:])


def opening(review: Review, rng: random.Random) -> int:
    """How many words of the review are its opening."""
    return rng.randint(*OPENING_WORDS)


def piece(review: Review, rng: random.Random, words: tuple[int, int] = PIECE_WORDS) -> str:
    """Some consecutive words from behind the review's opening."""
    length = rng.randint(*words)
    start = rng.randint(OPENING_WORDS[1], len(review.words) - length)
    return " ".join(review.words[start : start + length])


def cycled(reviews: list[Review], rng: random.Random) -> Iterator[Review]:
    """The reviews in a random order, again and again, each time another: every one is used equally often."""
    while True:
        yield from rng.sample(reviews, len(reviews))


def pair_rows(reviews: list[Review], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Pairs whose opening, chosen and rejected texts come from three reviews."""
    rng = random.Random(f"pairs {seed}")
    openings = cycled(reviews, rng)
    positives = cycled([review for review in reviews if review.positive], rng)
    negatives = cycled([review for review in reviews if not review.positive], rng)
    for _ in range(count):
        chosen, rejected = next(positives), next(negatives)
        first = next(review for review in openings if review is not chosen and review is not rejected)
        yield {
            "prompt": " ".join(first.words[: opening(first, rng)]),
            "chosen": " " + piece(chosen, rng),
            "rejected": " " + piece(rejected, rng),
        }


def sft_rows(reviews: list[Review], seed: int) -> Iterator[dict[str, Any]]:
    """Openings and the words that follow them in the same review."""
    rng = random.Random(f"sft {seed}")
    for review in reviews:
        start = opening(review, rng)
        end = start + rng.randint(*PIECE_WORDS)
        yield {"prompt": " ".join(review.words[:start]), "response": " " + " ".join(review.words[start:end])}


def prompt_rows(reviews: list[Review], seed: int) -> Iterator[dict[str, Any]]:
    """Openings, each once."""
    rng = random.Random(f"prompts {seed}")
    openings = (" ".join(review.words[: opening(review, rng)]) for review in reviews)
    yield from ({"prompt": text} for text in dict.fromkeys(openings))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write JSON lines; returns how many."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def write_all(reviews: list[Review], output: Path, *, seed: int, pairs: int) -> dict[str, int]:
    """Write every file; returns the rows of each."""
    splits = split(reviews, seed)
    lengths = range(OPENING_WORDS[0], OPENING_WORDS[1] + 1)
    taken = {" ".join(review.words[:n]) for review in splits.train for n in lengths}
    held_out = [row for row in prompt_rows(splits.held_out, seed) if row["prompt"] not in taken]
    output.mkdir(parents=True, exist_ok=True)
    files: dict[str, Iterable[dict[str, Any]]] = {
        "pretrain.jsonl": ({"text": review.text} for review in splits.train),
        "sft.jsonl": sft_rows(splits.train, seed),
        "pairs.jsonl": pair_rows(splits.train, pairs, seed),
        "prompts.jsonl": prompt_rows(splits.train, seed),
        "prompts_heldout.jsonl": held_out,
        "judge.jsonl": ({"label": "pos" if review.positive else "neg", "text": review.text} for review in splits.judge),
    }
    return {name: write_rows(output / name, rows) for name, rows in files.items()}


def reviews_file(given: Path | None) -> Path:
    """The reviews' file: the one given, else the one below RLHF_TEST_DATA."""
    folder = os.environ.get("RLHF_TEST_DATA")
    if given is None and not folder:
        raise SystemExit("error: name the reviews with --reviews FILE, or set RLHF_TEST_DATA")
    path = given or Path(str(folder)) / "pretrain" / "imdb_train.jsonl.gz"
    if not path.is_file():
        raise SystemExit(f"error: reviews = {path}: no such file")
    return path


def main() -> None:
    """Write the files and say how many rows each has."""
    parser = argparse.ArgumentParser(description="Sentiment data from film reviews")
    parser.add_argument("--reviews", type=Path, help="imdb_train.jsonl.gz; default: in RLHF_TEST_DATA")
    parser.add_argument("--output", type=Path, default=Path("data/imdb"))
    parser.add_argument("--pairs", type=int, default=15_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    reviews = read_reviews(reviews_file(options.reviews))
    for name, rows in write_all(reviews, options.output, seed=options.seed, pairs=options.pairs).items():
        print(f"{options.output / name}: {rows} rows")


if __name__ == "__main__":
    main()
