"""The outside judge of sentiment: a bag of words fitted on reviews that no training has seen.

    python benchmarks/sentiment_judge.py --data data/imdb                                    # how good is it
    python benchmarks/sentiment_judge.py --data data/imdb --baseline SFT --policy PPO        # what it says of two
    python launch/evaluate.py --judge benchmarks/sentiment_judge.py:judge ...                # the same in the table

Logistic regression on which words and pairs of words occur in pieces of 40 words, from ``judge.jsonl`` of
``sentiment_data.py``; four fifths of the reviews to fit it, one fifth to measure it.  It has no intercept, and a
text of unknown words alone counts as not positive: word salad wins nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray.config import EvaluateConfig, repository_path
from rlhf_ray.console import table
from rlhf_ray.data.rows import PromptRow
from rlhf_ray.evaluation.compare import Comparison, compare, sample_pairs

PIECE_WORDS = 40
FIRST_WORD = 12  # behind the opening


class SentimentJudge:
    """Says whether a text is positive."""

    def __init__(self, reviews: Path, *, seed: int = 0) -> None:
        """Fit on a JSON lines file of {label: pos or neg, text} and measure on a fifth of it."""
        rows = [json.loads(line) for line in reviews.read_text(encoding="utf-8").splitlines()]
        random.Random(seed).shuffle(rows)
        fifth = len(rows) // 5
        texts, labels = _pieces(rows[fifth:])
        words = CountVectorizer(ngram_range=(1, 2), min_df=5, binary=True)
        self._model: Pipeline = make_pipeline(
            words, LogisticRegression(C=0.1, fit_intercept=False, class_weight="balanced", max_iter=300)
        ).fit(texts, labels)
        held_out, truth = _pieces(rows[:fifth])
        said = self.positive(held_out)
        self.accuracy = float((said == truth).mean())
        """On held-out pieces."""
        self.held_out_positive = float(said.mean())
        """Share of held-out pieces that it calls positive."""
        self.held_out = len(held_out)

    def positive(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) bool."""
        return self._model.decision_function(list(texts)) > 0

    def fraction_positive(self, texts: Sequence[str]) -> float:
        """Share of the texts that are positive."""
        return float(self.positive(texts).mean())


def _pieces(rows: Sequence[dict[str, str]]) -> tuple[list[str], np.ndarray]:
    """Consecutive pieces of the reviews behind their openings, and whether each review is positive."""
    texts, labels = [], []
    for row in rows:
        words = row["text"].split()
        for start in range(FIRST_WORD, len(words) - PIECE_WORDS + 1, PIECE_WORDS):
            texts.append(" ".join(words[start : start + PIECE_WORDS]))
            labels.append(row["label"] == "pos")
    return texts, np.array(labels)


@cache
def load_judge(folder: Path) -> SentimentJudge:
    """The judge of a folder that ``sentiment_data.py`` wrote, fitted once."""
    file = repository_path(folder) / "judge.jsonl"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; write it with benchmarks/sentiment_data.py")
    return SentimentJudge(file)


def judge(response: str, **_: object) -> float:
    """1 for a positive response, else 0, so that the mean is the share of positive ones.

    The reviews are those of the folder in SENTIMENT_DATA, by default data/imdb.
    """
    folder = Path(os.environ.get("SENTIMENT_DATA", "data/imdb"))
    return float(load_judge(folder).positive([response])[0])


def compare_policies(options: argparse.Namespace, sentiment: SentimentJudge) -> Comparison:
    """Continuations of held-out openings by baseline and policy, rated."""
    config = EvaluateConfig(
        policy=options.policy,
        baseline=options.baseline,
        reward_model=None,
        prompts=options.data / "prompts_heldout.jsonl",
        template="plain",
        response_length=options.response_length,
        temperature=options.temperature,
        max_prompts=options.prompts,
        seed=options.seed,
    )

    def rate(_: PromptRow, response: str) -> float:
        return float(sentiment.positive([response])[0])

    return compare(config, judge=rate)


def show(comparison: Comparison, *, examples: int) -> None:
    """Print the three figures that count, and some samples."""
    before, after = comparison.baseline, comparison.policy
    assert before.judged is not None and after.judged is not None
    rows: list[list[object]] = [
        ["rated positive", float(np.mean(before.judged)), float(np.mean(after.judged))],
        ["sequence KL, nats", float(np.mean(before.kl)), float(np.mean(after.kl))],
        ["distinct-2", before.distinct_2, after.distinct_2],
        ["distinct-2 over the baseline's", 1.0, after.distinct_2 / before.distinct_2],
        ["length, tokens", float(np.mean(before.lengths)), float(np.mean(after.lengths))],
    ]
    table(f"{len(comparison.prompts)} held-out openings", ["", "baseline", "policy"], rows)
    if examples:
        cells = [list(pair.values()) for pair in sample_pairs(comparison)[:examples]]
        table("Samples", ["prompt", "baseline", "policy"], cells)


def main() -> None:
    """Fit and measure the judge; with --policy and --baseline, let it rate them."""
    parser = argparse.ArgumentParser(description="Outside judge of sentiment")
    parser.add_argument("--data", type=Path, default=Path("data/imdb"), help="folder of sentiment_data.py")
    parser.add_argument("--baseline", type=Path, help="SFT policy")
    parser.add_argument("--policy", type=Path, help="PPO policy")
    parser.add_argument("--prompts", type=int, default=512, help="held-out openings to continue")
    parser.add_argument("--response-length", type=int, default=56)
    parser.add_argument("--temperature", type=float, default=0.7, help="the one that PPO trained at")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        sentiment = load_judge(options.data)
        print(
            f"judge: accuracy {sentiment.accuracy:.3f} on {sentiment.held_out} held-out pieces of "
            f"{PIECE_WORDS} words, {sentiment.held_out_positive:.3f} of them called positive",
            flush=True,
        )
        if options.policy and options.baseline:
            show(compare_policies(options, sentiment), examples=options.examples)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
