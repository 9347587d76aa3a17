"""The floor of a reward model: a pair ranker that only counts the words of the two responses.

    python benchmarks/bag_of_words.py pairs.jsonl [--seeds 0 1 2] [--held-out 0.2] [--c 0.1 1 10]

Logistic regression without intercept on the difference of the two responses' word counts, split by prompt.  A
reward model that does not beat it has learned nothing that counting words has not.  The floor depends on the
penalty (``--c`` is its inverse), so several are printed.  Beside it: how often the chosen response is the
longer one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, vstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray.data.readers import read_pairs
from rlhf_ray.data.rows import PairRow
from rlhf_ray.data.splits import split_by_prompt


def fit_and_score(train: Sequence[PairRow], held_out: Sequence[PairRow], *, c: float) -> float:
    """Share of held-out pairs whose chosen response the ranker scores higher; ties count as wrong."""
    words = CountVectorizer(token_pattern=r"(?u)\b\w+\b")
    words.fit([row.chosen for row in train] + [row.rejected for row in train])

    def differences(rows: Sequence[PairRow]) -> csr_matrix:
        return words.transform([row.chosen for row in rows]) - words.transform([row.rejected for row in rows])

    x = differences(train)
    both, labels = vstack([x, -x]), np.repeat([1, 0], x.shape[0])
    ranker = LogisticRegression(C=c, fit_intercept=False, max_iter=1000).fit(both, labels)
    return float((ranker.decision_function(differences(held_out)) > 0).mean())


def chosen_is_longer(rows: Sequence[PairRow]) -> float:
    """Share of pairs whose chosen response has more characters."""
    return statistics.mean(len(row.chosen) > len(row.rejected) for row in rows)


def main() -> None:
    """Print the accuracy over seeds for each penalty, mean and spread, and the length baseline."""
    parser = argparse.ArgumentParser(description="Bag-of-words floor of a pairs file")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=float, default=0.2)
    parser.add_argument("--c", type=float, nargs="+", default=[0.1, 1.0, 10.0])
    options = parser.parse_args()
    rows = read_pairs(options.pairs)
    splits = [split_by_prompt(rows, options.held_out, seed) for seed in options.seeds]
    for c in options.c:
        accuracies = [fit_and_score(train, held_out, c=c) for train, held_out in splits]
        mean, spread = statistics.mean(accuracies), statistics.pstdev(accuracies)
        seeds = " ".join(f"{accuracy:.3f}" for accuracy in accuracies)
        print(f"bag of words, C {c:g}: accuracy {mean:.3f} +- {spread:.3f} (seeds: {seeds})")
    print(f"chosen is longer: {chosen_is_longer(rows):.3f} of {len(rows)} pairs")


if __name__ == "__main__":
    main()
