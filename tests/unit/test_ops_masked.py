"""Masked statistics, and aggregation whose gradient no split of the mini-batch changes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.ops.losses import policy_loss_terms, value_loss_terms
from rlhf_ray.ops.masked import (
    AGGREGATIONS,
    constant,
    masked_mean,
    masked_sum,
    masked_var,
    sequence_mean,
    token_mean,
    whiten,
)

X = math.nan
RAGGED = torch.tensor([[1.0, 2.0, X], [3.0, 4.0, 5.0], [7.0, X, X]])
WHITE = torch.tensor([[1.0, 2.0, X], [3.0, 5.0, 7.0]])
WHITENED = torch.tensor([[-1.20702, -0.742781, 0.0], [-0.278543, 0.649934, 1.57841]])


def test_statistics() -> None:
    mask = ~WHITE.isnan()
    assert masked_sum(WHITE, mask).item() == 18.0
    assert masked_mean(WHITE, mask).item() == pytest.approx(3.6)
    assert masked_var(WHITE, mask).item() == pytest.approx(4.64)
    assert masked_mean(WHITE, torch.zeros_like(mask)).item() == 0.0


def test_whiten() -> None:
    torch.testing.assert_close(whiten(WHITE, ~WHITE.isnan()), WHITENED, atol=1e-5, rtol=0)


def test_whiten_keeps_mean() -> None:
    mask = ~WHITE.isnan()
    torch.testing.assert_close(whiten(WHITE, mask, keep_mean=True), WHITENED + 3.6 * mask, atol=1e-5, rtol=0)


def test_whiten_of_equal_values_is_zero() -> None:
    x = torch.full((2, 3), 4.0)
    assert whiten(x, torch.ones(2, 3, dtype=torch.bool)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("junk", [1e4, math.nan, math.inf])
def test_junk_outside_the_mask_changes_nothing(junk: float) -> None:
    mask = ~RAGGED.isnan()
    results = []
    for fill in (0.0, junk):
        x = RAGGED.nan_to_num(fill).requires_grad_()
        weights = torch.arange(9.0).view(3, 3)
        (whiten(x, mask) * weights).sum().backward()
        assert x.grad is not None
        results.append((whiten(x, mask).detach(), masked_var(x, mask).detach(), x.grad))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert results[1][2][~mask].tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("aggregation", "expected"), [(token_mean, 3.66667), (sequence_mean, 4.16667), (constant, 2.44444)]
)
def test_aggregation(aggregation, expected: float) -> None:
    mask = ~RAGGED.isnan()
    denominator = aggregation.count(mask, 3)
    assert aggregation(RAGGED, mask, denominator=denominator).item() == pytest.approx(expected, abs=1e-5)


def test_rows_without_a_response_change_no_aggregate() -> None:
    mask = ~RAGGED.isnan()
    more, more_mask = torch.cat([RAGGED, RAGGED]), torch.cat([mask, torch.zeros_like(mask)])
    for aggregation in AGGREGATIONS.values():
        assert aggregation.count(more_mask, 3) == aggregation.count(mask, 3)
        assert aggregation.total(more, more_mask) == aggregation.total(RAGGED, mask)


# A mini-batch split over micro-batches and ranks

B, T, V, D = 8, 7, 11, 5


class TinyModel(nn.Module):
    """A bigram policy with a value head: enough to have gradients that depend on every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head, self.value = nn.Embedding(V, D), nn.Linear(D, V), nn.Linear(D, 1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.tanh(self.embedding(tokens[:, :-1]))  # (B, T-1, D)
        logp = self.head(hidden).log_softmax(-1)  # (B, T-1, V)
        chosen = logp.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return tuple(nn.functional.pad(x, (1, 0)) for x in (chosen, entropy, self.value(hidden)[..., 0]))


def mini_batch() -> tuple[TinyModel, list[Tensor]]:
    """A model, and (tokens, mask, old_logprobs, raw advantages, old_values, returns) of ragged rows."""
    torch.manual_seed(0)
    model = TinyModel().double()
    tokens = torch.randint(V, (B, T))
    ends = torch.tensor([2, 3, 7, 5, 4, 7, 3, 6])
    mask = (torch.arange(T) >= 1) & (torch.arange(T) < ends[:, None])
    with torch.no_grad():
        logprobs, _, values = model(tokens)
    noise = [0.3 * torch.randn(B, T, dtype=torch.float64) for _ in range(4)]
    return model, [tokens, mask, logprobs + noise[0], 3 + noise[1], values + noise[2], values + noise[3]]


def gradient(model: TinyModel, rows: list[Tensor], aggregation, denominator: Tensor) -> Tensor:
    tokens, mask, old_logprobs, advantages, old_values, returns = rows
    model.zero_grad()
    logprobs, entropy, values = model(tokens)
    policy = policy_loss_terms(logprobs, old_logprobs, advantages, mask).loss
    value = value_loss_terms(values, old_values, returns, mask).loss
    terms = policy + 0.1 * value - 0.01 * entropy
    aggregation(terms, mask, denominator=denominator).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_gradient_is_independent_of_micro_batch_and_ranks(name: str) -> None:
    aggregation = AGGREGATIONS[name]
    model, rows = mini_batch()
    rows[3] = whiten(rows[3], rows[1])  # over the whole batch, before it is split
    whole = gradient(model, rows, aggregation, aggregation.count(rows[1], T - 1))
    assert whole.norm() > 1e-3
    for ranks, micro in itertools.product((1, 2, 4), (1, 2, B)):
        parts = [[x[rank::ranks] for x in rows] for rank in range(ranks)]
        denominator = torch.stack([aggregation.count(part[1], T - 1) for part in parts]).sum()
        summed = torch.zeros_like(whole)
        for part in parts:
            for start in range(0, len(part[0]), micro):
                micro_rows = [x[start : start + micro] for x in part]
                summed += gradient(model, micro_rows, aggregation, denominator)
        torch.testing.assert_close(summed, whole, atol=1e-14, rtol=1e-10)


def test_aggregations_weigh_rows_differently() -> None:
    """The three gradients differ on ragged rows, so the test above compares three different things."""
    model, rows = mini_batch()
    gradients = [gradient(model, rows, a, a.count(rows[1], T - 1)) for a in AGGREGATIONS.values()]
    for one, other in itertools.combinations(gradients, 2):
        assert (one - other).norm() > 1e-3
