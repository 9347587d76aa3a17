"""Penalties, shaped rewards and generalised advantage estimation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.ops.advantages import (
    MISSING_EOS,
    clip_scores,
    gae,
    kl_shaped_rewards,
    last_token_index,
    replace_unfinished,
    subtract_unfinished,
)


def test_last_token_index() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert last_token_index(mask).tolist() == [2, 3, 0, -1]


def test_missing_eos_at_every_place_of_the_eos() -> None:
    mask = torch.tensor([[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 0]]).bool()
    finished = torch.tensor([True, True, True, False, True])
    scores = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5])
    assert last_token_index(mask).tolist() == [1, 2, 3, 3, 2]
    assert replace_unfinished(scores, finished, -1.0).tolist() == [0.5, 1.0, 1.5, -1.0, 2.5]
    assert subtract_unfinished(scores, finished, 1.0).tolist() == [0.5, 1.0, 1.5, 1.0, 2.5]
    assert set(MISSING_EOS) == {"replace", "subtract"}


def test_clip_scores() -> None:
    scores = torch.tensor([-7.0, 0.5, 7.0])
    assert clip_scores(scores, 5.0).tolist() == [-5.0, 0.5, 5.0]
    assert clip_scores(scores, 0.0).tolist() == [-7.0, 0.5, 7.0]


MASK = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]]).bool()


def test_rewards_of_an_unchanged_policy_are_the_score_alone() -> None:
    logprobs = torch.tensor([[0.0, -1.0, -2.0, -0.5], [0.0, -3.0, -0.1, 0.0]])
    rewards, kl = kl_shaped_rewards(torch.tensor([1.5, -2.0]), logprobs, logprobs.clone(), MASK, 0.05)
    assert kl.abs().max().item() < 1e-6
    assert rewards.tolist() == [[0.0, 0.0, 0.0, 1.5], [0.0, 0.0, -2.0, 0.0]]


@pytest.mark.parametrize("junk", [0.0, 1e4, math.nan])
def test_rewards_sum_to_score_less_priced_kl(junk: float) -> None:
    old = torch.tensor([[junk, -1.0, -2.0, -0.5], [junk, -3.0, -0.1, junk]])
    ref = torch.tensor([[junk, -1.5, -1.0, -0.7], [junk, -2.0, -0.2, junk]])
    scores, beta = torch.tensor([1.5, -2.0]), 0.1
    rewards, kl = kl_shaped_rewards(scores, old, ref, MASK, beta)
    expected = torch.tensor([[0.0, 0.5, -1.0, 0.2], [0.0, -1.0, 0.1, 0.0]])
    torch.testing.assert_close(kl, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(rewards.sum(1), scores - beta * kl.sum(1))
    torch.testing.assert_close(rewards[0], torch.tensor([0.0, -0.05, 0.1, 1.48]))
    assert rewards[~MASK].tolist() == [0.0] * 3


def test_gae() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.3]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.43675, 0.565, 0.7]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(returns, torch.tensor([[0.93675, 0.965, 1.0]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("junk", [None, 1e4, math.nan])
def test_gae_ignores_what_follows_the_response(junk: float | None) -> None:
    rewards = torch.tensor([[-0.01, 0.02, 1.0, 9.0, 9.0]])
    values = torch.tensor([[0.5, 0.4, 0.3, 7.0, 7.0]])
    if junk is not None:
        rewards[:, 3:], values[:, 3:] = junk, junk
    mask = torch.tensor([[1, 1, 1, 0, 0]]).bool()
    advantages, returns = gae(rewards, values, mask, 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.44575, 0.585, 0.7, 0, 0]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(returns, advantages + torch.tensor([[0.5, 0.4, 0.3, 0, 0]]))


def test_gae_limits_of_lambda() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(3, 6, generator=generator) for _ in range(2))
    mask, gamma = torch.ones(3, 6, dtype=torch.bool), 0.9
    rewards_to_go = torch.zeros(3)
    for t in reversed(range(6)):
        rewards_to_go = rewards[:, t] + gamma * rewards_to_go
        torch.testing.assert_close(gae(rewards, values, mask, gamma, 1.0)[0][:, t], rewards_to_go - values[:, t])
    following = torch.cat([values[:, 1:], torch.zeros(3, 1)], 1)
    delta = rewards + gamma * following - values
    torch.testing.assert_close(gae(rewards, values, mask, gamma, 0.0)[0], delta)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """Rewards, values and a mask full of holes (B, T), gamma, gae_lambda."""
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    rewards, values = (torch.randn(shape, generator=generator) for _ in range(2))
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.2, 0.5, 0.9]))
    return rewards, values, mask, draw(st.sampled_from([1.0, 0.9])), draw(st.sampled_from([0.0, 0.95, 1.0]))


@settings(max_examples=60, deadline=None)
@given(batches())
def test_masked_gae_equals_gae_of_the_compacted_tokens(
    batch: tuple[Tensor, Tensor, Tensor, float, float],
) -> None:
    rewards, values, mask, gamma, gae_lambda = batch
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    assert torch.equal(advantages[~mask], torch.zeros(int((~mask).sum())))
    assert torch.equal(returns[~mask], torch.zeros(int((~mask).sum())))
    for row in range(len(mask)):
        keep = mask[row]
        compact = torch.ones(1, int(keep.sum()), dtype=torch.bool)
        alone = gae(rewards[row, keep][None], values[row, keep][None], compact, gamma, gae_lambda)
        assert torch.equal(advantages[row, keep], alone[0][0])
        assert torch.equal(returns[row, keep], alone[1][0])


@settings(max_examples=30, deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_gae_commutes_with_a_permutation_of_rows(batch, random) -> None:
    rewards, values, mask, gamma, gae_lambda = batch
    order = random.sample(range(len(mask)), len(mask))
    plain = gae(rewards, values, mask, gamma, gae_lambda)
    permuted = gae(rewards[order], values[order], mask[order], gamma, gae_lambda)
    assert torch.equal(permuted[0], plain[0][order])
    assert torch.equal(permuted[1], plain[1][order])


@pytest.mark.gpu
def test_credit_on_the_gpu_equals_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    old, ref, values = (torch.randn(16, 64, generator=generator) for _ in range(3))
    mask, scores = torch.rand(16, 64, generator=generator) < 0.7, torch.randn(16, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        rewards, _ = kl_shaped_rewards(scores.to(device), old.to(device), ref.to(device), mask.to(device), 0.05)
        results.append([x.cpu() for x in gae(rewards, values.to(device), mask.to(device), 1.0, 0.95)])
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu, cpu)
