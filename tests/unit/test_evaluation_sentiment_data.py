"""The sentiment data: disjoint by review, and no opening that gives its pair away."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.functions import load_function

FILES = ("pretrain", "sft", "pairs", "prompts", "prompts_heldout", "judge")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A hundred reviews whose every word names its review, a duplicate, and one that is too short."""
    rows = [{"label": ("pos", "neg")[i % 2], "text": "<br />".join(f"r{i}w{j}" for j in range(80))} for i in range(100)]
    rows += [rows[0], {"label": "pos", "text": "too short"}]
    file = tmp_path / "reviews.jsonl.gz"
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return file


def written(repository: Path, reviews: Path, output: Path, *, seed: int) -> dict[str, list[dict[str, Any]]]:
    script = f"{repository / 'benchmarks' / 'sentiment_data.py'}:"
    everything = load_function(script + "read_reviews")(reviews)
    load_function(script + "write_all")(everything, output, seed=seed, pairs=200)
    return {name: [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()] for name in FILES}


def sources(text: str) -> set[str]:
    """The reviews that a text's words come from."""
    return {word.split("w")[0] for word in text.split()}


def used(rows: list[dict[str, Any]]) -> set[str]:
    return {source for row in rows for key, text in row.items() if key != "label" for source in sources(text)}


def test_splits_share_no_review(repository: Path, reviews: Path, tmp_path: Path) -> None:
    files = written(repository, reviews, tmp_path / "out", seed=0)
    train = used(files["pretrain"])
    assert (len(train), len(used(files["prompts_heldout"])), len(used(files["judge"]))) == (60, 10, 30)
    assert not used(files["judge"]) & (train | used(files["prompts_heldout"]))
    assert not train & used(files["prompts_heldout"])
    for name in ("sft", "pairs", "prompts"):
        assert used(files[name]) <= train


def test_a_pair_is_made_of_three_reviews(repository: Path, reviews: Path, tmp_path: Path) -> None:
    pairs = written(repository, reviews, tmp_path / "out", seed=0)["pairs"]
    assert len(pairs) == 200
    for row in pairs:
        texts = [row["prompt"], row["chosen"], row["rejected"]]
        opening, chosen, rejected = (sources(text) for text in texts)
        assert len(opening | chosen | rejected) == 3
        assert int(chosen.pop()[1:]) % 2 == 0 and int(rejected.pop()[1:]) % 2 == 1
        assert 8 <= len(texts[0].split()) <= 12
        assert all(20 <= len(text.split()) <= 36 and text.startswith(" r") for text in texts[1:])
        assert "<br" not in "".join(texts)


def test_the_seed_decides(repository: Path, reviews: Path, tmp_path: Path) -> None:
    one, same, other = (written(repository, reviews, tmp_path / str(i), seed=s) for i, s in enumerate((0, 0, 1)))
    assert one == same
    assert used(one["judge"]) != used(other["judge"])
