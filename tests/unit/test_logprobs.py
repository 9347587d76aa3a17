"""Chunked log-probabilities against the naive computation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_ray.ops import logprobs as module
from rlhf_ray.ops.logprobs import before, token_logprobs, weighted_nll_sum

B, T, D, V = 3, 11, 8, 53


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=g)
    weight = torch.randn(V, D, generator=g)
    tokens = torch.randint(0, V, (B, T), generator=g)
    mask = torch.rand(B, T, generator=g) < 0.6
    mask[:, 0] = False
    return hidden, weight, tokens, mask


def own(hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    return token_logprobs(hidden[before(mask)], weight, tokens, mask, **options)


def naive(hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(hidden @ weight.t() / temperature, -1)[:, :-1]  # (B, T-1, V)
    chosen = logp.gather(2, tokens[:, 1:, None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    zeros = torch.zeros(B, 1)
    return tuple(torch.cat([zeros, x], 1).masked_fill(~mask, 0.0) for x in (chosen, entropy))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_size", [1, 4, 1000, None])
def test_values_and_gradients_equal_the_naive_computation(temperature: float, chunk_size: int | None) -> None:
    hidden, weight, tokens, mask = inputs()
    results = []
    for function in (own, naive):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        options: dict[str, Any] = {"temperature": temperature}
        if function is own:
            options |= {"chunk_size": chunk_size, "with_entropy": True}
        values, entropy = function(h, w, tokens, mask, **options)
        (values.square().sum() + 0.3 * entropy.sum()).backward()
        results.append((values, entropy, h.grad / h.grad.abs().max(), w.grad / w.grad.abs().max()))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_entropy_is_optional_and_changes_no_value() -> None:
    arguments = inputs()
    values, entropy = own(*arguments)
    with_entropy, _ = own(*arguments, with_entropy=True)
    assert entropy is None
    torch.testing.assert_close(values, with_entropy, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), 1e4])
def test_what_the_mask_leaves_out_is_never_read(poison: float) -> None:
    hidden, weight, tokens, mask = inputs()
    read = torch.cat([mask[:, 1:], torch.zeros(B, 1, dtype=torch.bool)], 1)  # states that predict a masked token
    gradients = []
    for spoil in (False, True):
        h, w = hidden.clone(), weight.clone().requires_grad_()
        t = tokens.clone()
        if spoil:
            h[~read] = poison
            t[~mask] = 10**6
        h.requires_grad_()
        values, entropy = own(h, w, t, mask, chunk_size=4, with_entropy=True)
        (values.sum() + entropy.sum()).backward()
        gradients.append((values, entropy, h.grad, w.grad))
    for clean, spoiled in zip(*gradients, strict=True):
        assert torch.equal(clean, spoiled)


def test_the_first_token_has_no_logprob_and_an_empty_mask_no_gradient() -> None:
    hidden, weight, tokens, _ = inputs()
    hidden.requires_grad_()
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[:, 0] = True
    values, _ = own(hidden, weight, tokens, mask)
    assert not values.any()
    values.sum().backward()
    assert not hidden.grad.any()


def test_entropy_of_uniform_over_gpt2s_vocabulary() -> None:
    mask = torch.tensor([[False, True]])
    tokens = torch.tensor([[0, 50000]])
    values, entropy = own(torch.ones(1, 2, 4), torch.zeros(50257, 4), tokens, mask, with_entropy=True)
    assert entropy is not None
    assert entropy[0, 1].item() == pytest.approx(10.82490, abs=1e-5)
    assert values[0, 1].item() == pytest.approx(-math.log(50257), abs=1e-5)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_logits_that_are_not_kept_are_computed_again(monkeypatch: pytest.MonkeyPatch, with_entropy: bool) -> None:
    results = []
    for kept in (10**6, 0, 8 * V):
        monkeypatch.setattr(module, "KEPT", kept)
        hidden, weight, tokens, mask = inputs()
        states = hidden[before(mask)].requires_grad_()
        weight.requires_grad_()
        values, entropy = token_logprobs(states, weight, tokens, mask, chunk_size=4, with_entropy=with_entropy)
        loss = values.square().sum() + (entropy.sum() if entropy is not None else 0)
        again = torch.autograd.grad(loss, (states, weight), retain_graph=True)
        loss.backward()
        results.append((*again, states.grad, weight.grad))
    for result in results:
        for got, expected in zip(result, results[0][:2] * 2, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("chunk_size", [1, 4, 1000, None])
def test_the_weighted_loss_and_its_gradients_equal_the_naive_computation(chunk_size: int | None) -> None:
    hidden, weight, tokens, mask = inputs()
    weights = torch.rand(B, T, generator=torch.Generator().manual_seed(1))
    results = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            loss = weighted_nll_sum(h[before(mask)], w, tokens[mask], weights[mask], chunk_size=chunk_size)
        else:
            loss = -(weights * naive(h, w, tokens, mask, 1.0)[0]).sum()
        (loss / 7).backward()
        results.append((loss, h.grad, w.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert weighted_nll_sum(hidden[before(mask)], weight, tokens[mask], weights[mask]) == results[0][0]


def test_under_autocast_products_are_rounded_and_sums_are_not() -> None:
    hidden, weight, tokens, mask = inputs()
    expected, _ = own(hidden, weight, tokens, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, _ = own(hidden, weight, tokens, mask)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected, atol=0.1, rtol=0)
    assert not torch.equal(values, expected)
    logits = (hidden.bfloat16() @ weight.bfloat16().t()).float()
    reference = torch.log_softmax(logits, -1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(values[:, 1:][mask[:, 1:]], reference[mask[:, 1:]], atol=1e-5, rtol=0)


def test_bfloat16_states_and_weights_give_float32_results() -> None:
    hidden, weight, tokens, mask = inputs()
    values, _ = own(hidden.bfloat16(), weight.bfloat16(), tokens, mask)
    reference, _ = own(hidden.bfloat16().float(), weight.bfloat16().float(), tokens, mask)
    assert torch.equal(values, reference)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": -1.0}, {"chunk_size": 0}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        own(*inputs(), **options)


def nll_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (3, 5, 7), which are states before the identity as a head, targets and mask (3, 5)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    targets = torch.randint(7, (3, 5), generator=generator)
    return logits, targets, torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()


@pytest.mark.parametrize("weight", [1.0, 7.0])
def test_equal_weights_give_cross_entropy(weight: float) -> None:
    logits, targets, mask = nll_inputs()
    weights = torch.full((int(mask.sum()),), weight)
    loss = weighted_nll_sum(logits[mask], torch.eye(7), targets[mask], weights) / weights.sum()
    torch.testing.assert_close(loss, F.cross_entropy(logits[mask], targets[mask]))


def test_zero_weight_removes_a_token_and_parts_add_up() -> None:
    logits, targets, mask = nll_inputs()
    weights = mask.float()
    weights[0, 2] = 0.0
    kept = mask & (weights > 0)
    assert weights[mask].sum() == 6.0
    whole = weighted_nll_sum(logits[mask], torch.eye(7), targets[mask], weights[mask]) / 6.0
    torch.testing.assert_close(whole, F.cross_entropy(logits[kept], targets[kept]))
    parts = [
        weighted_nll_sum(logits[i][mask[i]], torch.eye(7), targets[i][mask[i]], weights[i][mask[i]]) / 6.0
        for i in range(3)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_masked_targets_have_no_gradient() -> None:
    logits, targets, mask = nll_inputs()
    states = torch.where(mask[..., None], logits, torch.nan).requires_grad_()
    weighted_nll_sum(states[mask], torch.eye(7), targets[mask], torch.full((7,), 2.0)).backward()
    expected = 2.0 * (logits.softmax(-1) - F.one_hot(targets, 7)) * mask[..., None]
    torch.testing.assert_close(states.grad, expected)
