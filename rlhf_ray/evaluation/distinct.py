"""Distinct-n: how many of the n-grams of a set of texts differ (Li et al. 2016, arXiv:1510.03055).

A policy that has collapsed onto a few phrases scores near 0.  The ratio falls as a set grows, so only sets of
equally many texts of like length compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def distinct_n(texts: Iterable[Sequence[object]], n: int = 2) -> float:
    """Different n-grams over all n-grams of texts, each a sequence of words or ids; 0 when there are none."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
