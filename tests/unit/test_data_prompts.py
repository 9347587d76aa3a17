"""The prompt stream: seeded epochs without repetition, any step at random."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data import PromptStream


def test_groups_are_consecutive_and_unique_to_the_step() -> None:
    stream = PromptStream(100, 12, group_size=4, seed=3)
    first, second = stream.take(0), stream.take(1)
    assert len(first) == 12
    assert first.group_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert second.group_ids.tolist() == [3] * 4 + [4] * 4 + [5] * 4
    assert (first.prompt_ids.reshape(3, 4) == first.prompt_ids[::4, None]).all()
    assert first.prompt_ids.dtype == first.group_ids.dtype == np.int64


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 5))
def test_an_epoch_takes_every_prompt_once(n_prompts: int, batch_size: int, seed: int) -> None:
    stream = PromptStream(n_prompts, batch_size, seed=seed)
    steps = -(-3 * n_prompts // batch_size)
    taken = np.concatenate([stream.take(step).prompt_ids for step in range(steps)])[: 3 * n_prompts]
    assert (np.sort(taken.reshape(3, n_prompts), axis=1) == np.arange(n_prompts)).all()


def test_a_step_depends_on_seed_and_step_alone() -> None:
    there = [PromptStream(50, 8, seed=7).take(step).prompt_ids.tolist() for step in range(20)]
    stream = PromptStream(50, 8, seed=7)
    assert [stream.take(step).prompt_ids.tolist() for step in reversed(range(20))] == there[::-1]
    assert PromptStream(50, 8, seed=8).take(0).prompt_ids.tolist() != there[0]
    epochs = np.concatenate(there[:18])[:100].reshape(2, 50)
    assert (epochs[0] != epochs[1]).any()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="n_prompts is 0"):
        PromptStream(0, 4)
    for batch_size, group_size in ((10, 4), (0, 1), (4, 0)):
        with pytest.raises(ValueError, match="expected a positive multiple of group_size"):
            PromptStream(5, batch_size, group_size=group_size)
