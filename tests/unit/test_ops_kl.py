"""KL estimators, their gradients by enumeration of a small categorical, and the controllers of beta."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_ray.ops.kl import ESTIMATORS, AdaptiveKL, FixedKL, k1, k2, k3, kl_terms, sequence_kl


def test_estimators() -> None:
    d = torch.tensor(0.5)
    assert k1(d).item() == pytest.approx(0.5, abs=1e-5)
    assert k2(d).item() == pytest.approx(0.125, abs=1e-5)
    assert k3(d).item() == pytest.approx(0.106531, abs=1e-5)


def test_k3_stays_finite_and_exact_near_zero() -> None:
    assert math.isfinite(k3(torch.tensor(-500.0)).item())
    assert k3(torch.tensor(1e-3)).item() == pytest.approx(5e-7, rel=1e-2)  # exp(-d) - 1 + d would lose this


def expected_gradient(logits: Tensor, ref_logprobs: Tensor, name: str) -> Tensor:
    """E_{a ~ pi} grad k(logpi(a) - logref(a)) by enumeration; the sampling carries no gradient."""
    logprobs = logits.log_softmax(0)
    terms = logprobs.detach().exp() * ESTIMATORS[name](logprobs - ref_logprobs)
    return torch.autograd.grad(terms.sum(), logits)[0]


def test_gradient_identities() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_()
    ref = torch.randn(6, dtype=torch.float64, generator=generator).log_softmax(0)
    logprobs = logits.log_softmax(0)
    forward = (logprobs.exp() * (logprobs - ref)).sum()  # KL(pi || ref)
    reverse = (ref.exp() * (ref - logprobs)).sum()  # KL(ref || pi)
    grad_forward = torch.autograd.grad(forward, logits, retain_graph=True)[0]
    grad_reverse = torch.autograd.grad(reverse, logits)[0]
    assert (grad_forward - grad_reverse).norm() > 0.1  # the two directions differ here

    torch.testing.assert_close(expected_gradient(logits, ref, "k1"), torch.zeros_like(logits))
    torch.testing.assert_close(expected_gradient(logits, ref, "k2"), grad_forward)
    torch.testing.assert_close(expected_gradient(logits, ref, "k3"), grad_reverse)


def test_expected_value_of_k1_and_k3_is_the_divergence() -> None:
    logprobs = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    ref = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    divergence = (logprobs.exp() * (logprobs - ref)).sum()
    for estimator in (k1, k3):
        torch.testing.assert_close((logprobs.exp() * estimator(logprobs - ref)).sum(), divergence)


@pytest.mark.parametrize("junk", [1e4, math.nan])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_kl_ignores_masked_entries(name: str, junk: float) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    ref = torch.tensor([[-1.0, -2.0, junk], [-0.5, junk, junk]])
    logprobs = torch.tensor([[-1.5, -1.0, junk], [-0.5, junk, junk]]).requires_grad_()
    terms = kl_terms(logprobs, ref, mask, ESTIMATORS[name])
    expected = ESTIMATORS[name](torch.tensor([[-0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(sequence_kl(logprobs, ref, mask, ESTIMATORS[name]), expected.sum(1))
    terms.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[~mask].tolist() == [0.0, 0.0, 0.0]
    assert logprobs.grad.isfinite().all()


@pytest.mark.parametrize(("kl", "expected"), [(0.0, 0.148464), (6.6, 0.150768), (9.0, 0.151536), (6.0, 0.15)])
def test_adaptive_controller(kl: float, expected: float) -> None:
    controller = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    controller.update(kl, 512)
    assert controller.coef == pytest.approx(expected, abs=1e-6)


def test_adaptive_controller_continues_from_its_state() -> None:
    one, other = (AdaptiveKL(0.15, target=6.0, horizon=10_000) for _ in range(2))
    one.update(3.0, 512)
    other.load_state_dict(one.state_dict())
    for controller in (one, other):
        controller.update(11.0, 512)
    assert one.coef == other.coef != 0.15


def test_adaptive_controller_settles_at_its_target() -> None:
    """On a policy whose KL falls as 1 / beta, the controller finds the beta that gives the target."""
    controller, kl = AdaptiveKL(0.5, target=6.0, horizon=1_000), 0.0
    for _ in range(400):
        kl = 1.2 / controller.coef
        controller.update(kl, 128)
    assert kl == pytest.approx(6.0, rel=0.01)


def test_fixed_controller_is_the_configurations() -> None:
    controller = FixedKL(0.05)
    controller.update(100.0, 512)
    controller.load_state_dict({"coef": 7.0})
    assert controller.coef == 0.05
    assert controller.state_dict() == {"coef": 0.05}


def test_bad_controllers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="kl_coef is -1"):
        FixedKL(-1.0)
    with pytest.raises(ValueError, match="kl_target is 0"):
        AdaptiveKL(0.1, target=0.0, horizon=10_000)
    with pytest.raises(ValueError, match="kl_horizon is -5"):
        AdaptiveKL(0.1, target=6.0, horizon=-5)
    with pytest.raises(ValueError, match="kl_coef is nan"):
        AdaptiveKL(0.1, target=6.0, horizon=10).load_state_dict({"coef": math.nan})
