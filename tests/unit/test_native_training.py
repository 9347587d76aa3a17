"""Compiled attention and GELU, and their gradients, beside torch's own in double precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_ray.models import GPT2, GPT2Config
from rlhf_ray.models.layout import Layout
from rlhf_ray.native import training


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def by_document(qkv: Tensor, lengths: list[int]) -> Tensor:
    """Each document through torch's attention alone."""
    documents = [x.transpose(0, 2).unbind(1) for x in qkv.split(lengths)]  # 3 x (H, t, d) each
    return torch.cat([F.scaled_dot_product_attention(*x, is_causal=True).transpose(0, 1) for x in documents])


@pytest.mark.parametrize(
    ("H", "d", "lengths"), [(4, 32, [70, 33, 32, 31, 17, 16, 1]), (2, 48, [129, 64]), (1, 16, [5]), (3, 64, [200, 15])]
)
def test_attention_and_its_gradient_are_those_of_torch(H: int, d: int, lengths: list[int]) -> None:
    exact, by_out = numbers(sum(lengths), 3, H, d), numbers(sum(lengths), H, d)
    qkv, wide = exact.float().requires_grad_(), exact.clone().requires_grad_()
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    assert training.serves(qkv)
    out, expected = training.attention(qkv, bounds), by_document(wide, lengths)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)
    out.backward(by_out.float())
    expected.backward(by_out)
    assert qkv.grad is not None and wide.grad is not None
    torch.testing.assert_close(qkv.grad.double(), wide.grad, rtol=1e-5, atol=5e-6)


def test_a_document_s_numbers_depend_neither_on_others_nor_on_threads() -> None:
    lengths, before = [60, 41, 7], torch.get_num_threads()
    qkv = numbers(sum(lengths), 3, 2, 32).float()
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(training.attention(qkv, bounds))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(training.attention(qkv[60:101], torch.tensor([0, 41])), found[0][60:101])


def test_gelu_and_its_gradient_are_those_of_torch() -> None:
    exact = torch.linspace(-30, 30, 10_007, dtype=torch.float64)
    x, wide = exact.float().requires_grad_(), exact.clone().requires_grad_()
    out, expected = training.gelu(x), F.gelu(wide, approximate="tanh")
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    out.sum().backward()
    expected.sum().backward()
    assert x.grad is not None and wide.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=3e-6)
    assert training.gelu(torch.tensor([float("nan")])).isnan().all()


def test_a_model_says_the_same_with_and_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=50, n_positions=64, n_embd=64, n_layer=2, n_head=2))
    tokens = torch.randint(50, (3, 40))
    mask = torch.arange(40) < torch.tensor([[40], [21], [3]])
    said = []
    for served in (True, False):
        if not served:
            monkeypatch.setattr(training, "serves", lambda _: False)
        states = model.states(tokens, Layout.of(mask))
        model.zero_grad()
        (states * numbers(64, 64).float()).mean().backward()
        assert (type(states.grad_fn).__name__, len(states)) == ("NativeLayerNormBackward0", 64)
        said.append((states.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(said[0], said[1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(said[0][0], said[1][0])  # two ways, indeed
