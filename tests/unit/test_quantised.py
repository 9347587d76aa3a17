"""Weights that never learn, in fewer bits: how far rows move, products and gradients, and PPO over them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_folders import make_policy, make_reward_model

from rlhf_ray.models.hf_weights import load_policy, load_reward_model
from rlhf_ray.models.quantised import FrozenLinear, Packed
from rlhf_ray.ops import logprobs


@pytest.mark.parametrize(
    ("kind", "error", "bits"), [("bfloat16", 2**-8, 16), ("int8", 0.5 / 127, 8), ("int4", 0.5 / 7, 4)]
)
def test_rows_come_back_within_half_a_step(kind: str, error: float, bits: int) -> None:
    x = (
        torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.arange(50)[:, None]
    )  # a row of zeros too
    packed = Packed.of(x, kind)
    assert packed.codes.nbytes == x.numel() * bits // 8 and packed.shape == (50, 64)
    assert ((packed.float() - x).abs() <= error * x.abs().amax(1, keepdim=True) + 1e-12).all()
    some = torch.tensor([7, 0, 7])
    assert torch.equal(packed.rows(some), packed.float()[some])


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_a_frozen_layer_computes_and_passes_gradients_as_its_unpacked_weight(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_ray.models.quantised.BLOCK", {"cpu": 3 * 64})  # three rows at a time
    torch.manual_seed(0)
    layer = FrozenLinear(Packed.of(torch.randn(20, 64), kind), torch.randn(20))
    x, upstream = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 20)
    out = layer(x)
    (found,) = torch.autograd.grad(out, x, upstream)
    torch.testing.assert_close(out, x @ layer.weight.t() + layer.bias, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, upstream @ layer.weight, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_packed_head_gives_the_logprobs_losses_and_gradients_of_its_unpacked_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlhf_ray.models.quantised.BLOCK", {"cpu": 7 * 32})
    torch.manual_seed(0)
    packed = Packed.of(torch.randn(50, 32), "int8")
    states, tokens = torch.randn(8, 32, requires_grad=True), torch.randint(50, (1, 9))
    mask = torch.ones(1, 9, dtype=torch.bool)

    def found(weight: Packed | torch.Tensor) -> list[torch.Tensor]:
        taken, entropy = logprobs.token_logprobs(states, weight, tokens, mask, chunk_size=3, with_entropy=True)
        assert entropy is not None
        loss = logprobs.weighted_nll_sum(states, weight, tokens[0, 1:], torch.ones(8), chunk_size=3)
        gradients = [torch.autograd.grad(x, states)[0] for x in ((taken * torch.arange(9) + entropy).sum(), loss)]
        return [taken, entropy, loss, *gradients]

    for ours, whole in zip(found(packed), found(packed.float()), strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)


def test_a_folder_opens_frozen_and_says_nearly_the_same(tmp_path: Path) -> None:
    folder, tokens = make_policy(tmp_path / "policy"), torch.arange(40)[None]
    whole = load_policy(folder).eval()
    expected = whole.logits(whole(tokens)).log_softmax(-1)
    for kind, limit in (("bfloat16", 0.05), ("int8", 0.1)):
        frozen = load_policy(folder, frozen=kind).eval()
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
        error = (frozen.logits(frozen(tokens)).log_softmax(-1) - expected).abs().max()
        assert 0 < error < limit, kind
    with pytest.raises(
        ValueError, match=r"memory\.frozen = int4 needs a width that 32 divides; this model has one of 16"
    ):
        load_policy(folder, frozen="int4")
    reward = make_reward_model(tmp_path / "reward")
    mask = torch.ones_like(tokens)
    scores = [load_reward_model(reward, frozen=kind).eval()(tokens, mask).item() for kind in ("float32", "int8")]
    assert scores[1] == pytest.approx(scores[0], abs=0.1) and scores[0] != scores[1]
