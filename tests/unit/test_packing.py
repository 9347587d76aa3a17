"""Packing keeps every document whole, needs few rows, and never makes a first token a target."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data import best_fit, pack


def test_worked_example() -> None:
    packed = pack([[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]], 5, pad_id=0)
    assert packed.tokens.tolist() == [[7, 8, 9, 10, 6], [1, 2, 3, 4, 5]]
    assert packed.document_ids.tolist() == [[1, 1, 1, 1, 2], [1, 1, 1, 2, 2]]
    assert packed.weights.tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 0, 1]]


def test_the_tightest_row_is_taken() -> None:
    # 6 and 5 leave rooms of 4 and 5; the 4 must go into the first, so that the 5 still fits the second.
    assert best_fit([6, 5, 5, 4], 10) == [[0, 3], [1, 2]]
    assert best_fit([7, 6, 3, 2], 10) == [[0, 2], [1, 3]]


def test_weights_and_padding() -> None:
    packed = pack([[5, 6, 7], [8, 9]], 4, weights=[[3, 2, 0], [9, 0.5]], pad_id=99)
    assert packed.tokens.tolist() == [[5, 6, 7, 99], [8, 9, 99, 99]]
    assert packed.document_ids.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert packed.weights.tolist() == [[0, 2, 0, 0], [0, 0.5, 0, 0]]
    assert (packed.tokens.dtype, packed.weights.dtype) == (np.int64, np.float32)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="document 1 has 6 tokens, expected 1 to 5"):
        pack([[1], [1] * 6], 5)
    with pytest.raises(ValueError, match="document 0 has 0 tokens"):
        pack([[]], 5)
    with pytest.raises(ValueError, match="document 0 has 2 tokens but 1 weights"):
        pack([[1, 2]], 5, weights=[[1.0]])
    assert len(pack([], 5)) == 0


lengths = st.lists(st.integers(1, 16), max_size=60)


@given(lengths)
def test_every_document_once_and_whole(sizes: list[int]) -> None:
    documents = [[100 * index + token for token in range(size)] for index, size in enumerate(sizes)]
    packed = pack(documents, 16, pad_id=-1)
    found = [
        row[ids == number].tolist()
        for row, ids in zip(packed.tokens, packed.document_ids, strict=True)
        for number in range(1, ids.max() + 1)
    ]
    assert sorted(found) == sorted(documents)
    assert ((packed.tokens == -1) == (packed.document_ids == 0)).all()
    assert packed.weights.sum() == sum(sizes) - len(sizes)


@given(lengths)
def test_no_two_rows_could_have_been_one(sizes: list[int]) -> None:
    bins = best_fit(sizes, 16)
    assert sorted(index for members in bins for index in members) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in members) <= 16 for members in bins)
    loads = sorted(sum(sizes[index] for index in members) for members in bins)
    assert len(bins) < 2 or loads[0] + loads[1] > 16
    assert bins == best_fit(sizes, 16)
