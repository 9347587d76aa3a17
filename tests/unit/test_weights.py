"""Weights on their way: the digest finds whatever can happen to them, and they are taken over in place."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from small_models import random_model

from rlhf_ray.models import GPT2
from rlhf_ray.workers.weights import CHUNK, digest, export_weights, import_weights

VERSION = 3


@pytest.fixture(scope="module")
def buffer() -> np.ndarray:
    """Two whole chunks and a part of one."""
    made = np.random.default_rng(0).standard_normal(5 * CHUNK // 8, dtype=np.float32)
    made.setflags(write=False)  # as it arrives from shared memory
    return made


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_change_the_digest(buffer: np.ndarray, threads: int) -> None:
    assert digest(buffer, VERSION, threads=threads) == digest(buffer, VERSION)


@pytest.mark.parametrize("bit", [0, 31, 8 * CHUNK - 1, 8 * CHUNK, 20 * CHUNK - 1])
def test_a_flipped_bit_is_found(buffer: np.ndarray, bit: int) -> None:
    altered = buffer.copy()
    altered.view(np.uint8)[bit // 8] ^= 1 << bit % 8
    assert digest(altered, VERSION) != digest(buffer, VERSION)
    altered.view(np.uint8)[bit // 8] ^= 1 << bit % 8
    assert digest(altered, VERSION) == digest(buffer, VERSION)


def test_exchanged_repeated_and_missing_parts_are_found(buffer: np.ndarray) -> None:
    first, second, rest = np.split(buffer, [CHUNK // 4, CHUNK // 2])
    parts = [(second, first, rest), (first, first, rest), (first, second), (first, second, rest, rest[:0])]
    *altered, whole = [digest(np.concatenate(part), VERSION) for part in parts]
    assert whole == digest(buffer, VERSION)
    assert len({whole, *altered}) == 4


def test_another_versions_number_is_found(buffer: np.ndarray) -> None:
    assert digest(buffer, VERSION) != digest(buffer, VERSION + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_only_weights_are_taken_over_in_place_and_noticed(dtype: torch.dtype) -> None:
    policy = random_model()
    held = random_model().to(dtype)
    addresses = [p.data_ptr() for p in held.parameters()]
    counts = [p._version for p in held.parameters()]
    weights = export_weights(policy, VERSION, dtype, threads=2)
    weights.buffer.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_weights(held, weights)
    for mine, sent in zip(held.parameters(), policy.parameters(), strict=True):
        assert torch.equal(mine, sent.to(dtype))
    assert [p.data_ptr() for p in held.parameters()] == addresses
    assert all(p._version > count for p, count in zip(held.parameters(), counts, strict=True))  # engines look at it


def test_an_export_is_a_copy() -> None:
    policy: GPT2 = random_model()
    weights = export_weights(policy, VERSION, torch.float32)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1)
    import_weights(policy, weights)  # an older version can be given after newer ones were made
    assert digest(export_weights(policy, VERSION, torch.float32).buffer, VERSION) == weights.digest
