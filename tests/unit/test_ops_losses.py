"""Loss terms and diagnostics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_ray.ops.losses import (
    PolicyTerms,
    dpo_log_ratio,
    dpo_loss_terms,
    explained_variance,
    ipo_loss_terms,
    log_importance,
    max_ratio,
    pair_loss_terms,
    policy_diagnostics,
    policy_loss_terms,
    value_loss_terms,
)
from rlhf_ray.ops.masked import masked_sum


def row(*values: float) -> Tensor:
    return torch.tensor([values])


def all_true(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def policy_terms(advantages: Tensor, ratios: Tensor, **options: float) -> PolicyTerms:
    return policy_loss_terms(ratios.log(), torch.zeros_like(ratios), advantages, all_true(ratios), **options)


def test_clipped_surrogate() -> None:
    terms = policy_terms(row(1.0, -1.0), row(1.3, 0.7))
    torch.testing.assert_close(terms.loss, row(-1.2, 0.8), atol=1e-5, rtol=0)
    assert terms.clipped.tolist() == [[True, True]]


def test_unequal_clip_bounds() -> None:
    terms = policy_terms(row(1.0, 1.0, -1.0), row(1.27, 1.5, 0.7), clip_low=0.4, clip_high=0.28)
    torch.testing.assert_close(terms.loss, row(-1.27, -1.28, 0.7), atol=1e-5, rtol=0)
    assert terms.clipped.tolist() == [[False, True, False]]


def test_dual_clip_bounds_bad_tokens_alone() -> None:
    advantages, ratios = row(-1.0, -1.0, 1.0), row(5.0, 1.1, 5.0)
    torch.testing.assert_close(policy_terms(advantages, ratios).loss, row(5.0, 1.1, -1.2), atol=1e-5, rtol=0)
    capped = policy_terms(advantages, ratios, dual_clip=3.0).loss
    torch.testing.assert_close(capped, row(3.0, 1.1, -1.2), atol=1e-5, rtol=0)


def test_stale_rows_are_weighted_by_how_much_likelier_they_have_become() -> None:
    """Three policies: mu sampled, pi_old began the step, pi_theta learns; A = 1."""
    theta, old, mu = row(-1.0).requires_grad_(), row(-1.3), row(-1.5)
    mask = all_true(old)
    weights = log_importance(old, mu, mask).exp()
    terms = policy_loss_terms(theta, old, row(1.0), mask, importance_weights=weights)
    assert terms.log_ratio.exp().item() == pytest.approx(1.34986, abs=1e-5)
    assert weights.item() == pytest.approx(1.22140, abs=1e-5)
    assert terms.loss.item() == pytest.approx(-1.46568, abs=1e-5)
    assert terms.clipped.item()
    of_old = policy_loss_terms(theta, old, row(1.0), mask, importance_weights=log_importance(old, old, mask).exp())
    assert of_old.loss.item() == policy_loss_terms(theta, old, row(1.0), mask).loss.item()  # mu = old: plain PPO


def test_no_gradient_flows_through_the_weights_of_stale_rows() -> None:
    theta, mu = row(-1.0, -2.0).requires_grad_(), row(-1.5, -1.0).requires_grad_()
    mask = all_true(mu)
    old = theta.detach().clone().requires_grad_()
    weights = (old - mu).exp()
    policy_loss_terms(theta, old.detach(), row(0.5, -1.0), mask, importance_weights=weights).loss.sum().backward()
    torch.testing.assert_close(theta.grad, weights.detach() * row(-0.5, 1.0))
    assert old.grad is None and mu.grad is None
    assert not log_importance(old, mu, mask).requires_grad


def test_log_importance_is_clamped_and_blind_outside_the_mask() -> None:
    mask = torch.tensor([[True, True, False]])
    found = log_importance(row(-1.0, 100.0, math.nan), row(-2.0, -100.0, 1e4), mask)
    assert found.tolist() == [[1.0, 20.0, 0.0]]


def test_log_ratio_is_clamped() -> None:
    logprobs = row(-100.0, 500.0).requires_grad_()
    terms = policy_loss_terms(logprobs, row(0.0, 0.0), row(-1.0, -1.0), all_true(logprobs))
    assert terms.log_ratio.tolist() == [[-20.0, 20.0]]
    torch.testing.assert_close(terms.loss, row(0.8, math.exp(20.0)))
    terms.loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


def test_first_mini_batch_is_unclipped_and_has_the_policy_gradient() -> None:
    logprobs = row(-1.0, -2.0, -0.3).requires_grad_()
    advantages = row(0.5, -1.5, 2.0)
    terms = policy_loss_terms(logprobs, logprobs.detach().clone(), advantages, all_true(logprobs))
    assert (terms.log_ratio.exp() - 1).abs().max() < 1e-5
    assert not terms.clipped.any()
    terms.loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_policy_diagnostics_add_up_over_micro_batches() -> None:
    log_ratios = row(0.1, -0.4, 0.5, 0.0)
    mask = torch.tensor([[True, True, True, False]])
    whole = policy_loss_terms(log_ratios, torch.zeros(1, 4), torch.ones(1, 4), mask)
    diagnostics = policy_diagnostics(whole, mask, denominator=3.0)
    d = torch.tensor([0.1, -0.4, 0.5])
    expected = {
        "policy/approxkl_avg": (0.5 * d**2).mean(),
        "policy/update_kl": (d.exp() - 1 - d).mean(),
        "policy/clipfrac_avg": torch.tensor(1 / 3),
        "val/ratio": d.exp().mean(),
    }
    torch.testing.assert_close(diagnostics, expected)
    assert max_ratio(whole, mask).item() == pytest.approx(math.exp(0.5))

    halves = []
    for columns in (slice(0, 2), slice(2, 4)):
        part = policy_loss_terms(log_ratios[:, columns], torch.zeros(1, 2), torch.ones(1, 2), mask[:, columns])
        halves.append(policy_diagnostics(part, mask[:, columns], denominator=3.0))
    torch.testing.assert_close({name: sum(half[name] for half in halves) for name in expected}, expected)


def test_max_ratio_looks_inside_the_mask_alone() -> None:
    mask = torch.tensor([[True, False]])
    terms = policy_loss_terms(row(-1.0, 3.0), row(0.0, 0.0), row(1.0, 1.0), mask)
    assert max_ratio(terms, mask).item() == pytest.approx(math.exp(-1.0))


def test_value_loss() -> None:
    terms = value_loss_terms(row(0.5), row(0.0), row(1.0), all_true(row(0.5)))
    assert terms.loss.item() == pytest.approx(0.32, abs=1e-5)
    assert terms.clipped.item()
    unclipped = value_loss_terms(row(0.5), row(0.0), row(1.0), all_true(row(0.5)), clip_range=0.0)
    assert unclipped.loss.item() == pytest.approx(0.125, abs=1e-5)
    assert not unclipped.clipped.any()


def test_a_value_inside_the_range_is_never_counted_as_clipped() -> None:
    old, values = torch.rand(2, 1, 999, generator=torch.Generator().manual_seed(0)) * 0.19
    assert (old + (values - old) != values).any()  # rounding, by which the branches differ
    for returns in (old - 1, old + 1):
        assert not value_loss_terms(values, old, returns, all_true(old)).clipped.any()


def test_value_clip_never_hides_an_error() -> None:
    """A prediction that moved too far *away* from the return keeps its gradient."""
    values = row(-1.0).requires_grad_()
    terms = value_loss_terms(values, row(0.0), row(1.0), all_true(values))
    assert terms.loss.item() == pytest.approx(2.0)
    terms.loss.sum().backward()
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(-2.0)


@pytest.mark.parametrize("junk", [1e4, math.nan])
@pytest.mark.parametrize("dual_clip", [0.0, 3.0])
def test_masked_entries_change_no_loss_and_no_gradient(junk: float, dual_clip: float) -> None:
    """The clean row is the masked part alone; the other has junk in every tensor after it."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(6, 4, 3, generator=generator)
    dirty = torch.cat([clean, torch.full((6, 4, 2), junk)], 2)
    results = []
    for logprobs, old, advantages, values, old_values, returns in (clean, dirty):
        mask = torch.zeros(logprobs.shape, dtype=torch.bool)
        mask[:, :3] = True
        logprobs, values = logprobs.clone().requires_grad_(), values.clone().requires_grad_()
        policy = policy_loss_terms(logprobs, old, advantages, mask, dual_clip=dual_clip)
        value = value_loss_terms(values, old_values, returns, mask)
        (masked_sum(policy.loss, mask) + masked_sum(value.loss, mask)).backward()
        assert logprobs.grad is not None
        assert values.grad is not None
        for grad in (logprobs.grad, values.grad):
            assert torch.equal(grad[~mask], torch.zeros(int((~mask).sum())))
        results.append(
            [
                *(x[:, :3] for x in (policy.loss, value.loss, logprobs.grad, values.grad)),
                explained_variance(values, returns, mask),
                max_ratio(policy, mask),
                *policy_diagnostics(policy, mask, denominator=12.0).values(),
            ]
        )
        assert torch.equal(policy.loss[~mask].abs(), torch.zeros(int((~mask).sum())))
        assert not (policy.clipped | value.clipped)[~mask].any()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert results[0][2].abs().sum() > 0


def test_explained_variance() -> None:
    returns, mask = row(1.0, 2.0, 3.0, 99.0), torch.tensor([[True, True, True, False]])
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(torch.full((1, 4), 2.0), returns, mask).item() == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(row(1.0, 2.0, 4.0, 0.0), returns, mask).item() == pytest.approx(0.5)
    assert explained_variance(row(1.0, 1.0), row(1.0, 1.0), all_true(row(1.0, 1.0))).item() == 1.0


@pytest.mark.parametrize(
    ("difference", "margin", "expected"), [(1.0, 0.0, 0.313262), (1.0, 0.5, 0.474077), (0.0, 0.0, 0.693147)]
)
def test_pair_loss(difference: float, margin: float, expected: float) -> None:
    rejected = torch.tensor([0.3])
    loss = pair_loss_terms(rejected + difference, rejected, torch.tensor([margin]))
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_pair_loss_smoothing_and_centring() -> None:
    chosen, rejected = torch.tensor([1.2, 0.0]), torch.tensor([0.2, 0.0])
    smooth = pair_loss_terms(chosen, rejected, label_smoothing=0.1)
    torch.testing.assert_close(smooth, torch.tensor([0.9 * 0.313262 + 0.1 * 1.313262, 0.693147]))
    centred = pair_loss_terms(chosen, rejected, centre_coef=0.01)
    torch.testing.assert_close(centred, torch.tensor([0.313262 + 0.01 * 1.96, 0.693147]))


def test_pair_loss_of_a_hopeless_pair_is_finite() -> None:
    assert pair_loss_terms(torch.tensor([-500.0]), torch.tensor([500.0])).item() == pytest.approx(1000.0)


def test_dpo_and_ipo() -> None:
    h = dpo_log_ratio(*(torch.tensor([x]) for x in (-10.0, -13.0, -11.0, -12.0)))
    assert h.item() == 2.0
    assert dpo_loss_terms(h, beta=0.1).item() == pytest.approx(0.598139, abs=1e-5)
    assert dpo_loss_terms(h, beta=0.1, label_smoothing=0.1).item() == pytest.approx(0.618139, abs=1e-5)
    assert dpo_loss_terms(torch.zeros(1), beta=0.1).item() == pytest.approx(0.693147, abs=1e-5)
    assert ipo_loss_terms(h, beta=0.1).item() == pytest.approx(9.0, abs=1e-5)
