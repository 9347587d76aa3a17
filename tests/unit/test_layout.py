"""Layouts: which tokens are computed on, in which grids, and what micro-batches hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_ray.models import GPT2, GPT2Config, layout
from rlhf_ray.models.layout import Layout, put, take
from rlhf_ray.models.scoring import compute_type, row_ranges

CONFIG = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4)


def ids(*rows: str) -> Tensor:
    return torch.tensor([[int(character) for character in row] for row in rows])


@pytest.fixture
def many_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small grids are split too."""
    monkeypatch.setattr(layout, "SMALL", 0)


@pytest.mark.usefixtures("many_grids")
def test_tokens_go_document_by_document_the_longest_first() -> None:
    made = Layout.of(ids("1100", "0222", "3313"))
    assert made.places.tolist() == [5, 6, 7, 0, 1, 8, 9, 10, 11]
    assert made.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 0]
    assert made.longest == 3
    assert [(grid.documents, grid.width, grid.tokens) for grid in made.grids] == [(1, 3, 3), (2, 2, 4), (2, 1, 2)]


def test_a_document_ends_with_its_row() -> None:
    made = Layout.of(ids("11", "11"))
    assert made.positions.tolist() == [0, 1, 0, 1]
    assert [(grid.documents, grid.width, grid.cells) for grid in made.grids] == [(2, 2, None)]


@pytest.mark.usefixtures("many_grids")
def test_documents_of_like_length_share_a_grid() -> None:
    lengths = torch.tensor([8, 6, 7, 5])
    made = Layout.of(torch.arange(8) < lengths[:, None])
    assert [(grid.documents, grid.width, grid.tokens) for grid in made.grids] == [(3, 8, 21), (1, 5, 5)]
    assert made.grids[0].cells is not None and made.grids[1].cells is None
    assert made.grids[0].cells.tolist() == [*range(8), *range(8, 15), *range(16, 22)]


def test_small_grids_take_documents_of_any_length() -> None:
    lengths = torch.tensor([800, 3, 700, 90])
    made = Layout.of(torch.arange(800) < lengths[:, None])
    assert [(grid.documents, grid.width, grid.tokens) for grid in made.grids] == [(2, 800, 1500), (2, 90, 93)]


@pytest.mark.parametrize("small", [0, 2048])
def test_hidden_states_are_computed_where_they_are_read_and_equal_all_of_them(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SMALL", small)
    torch.manual_seed(0)
    model = GPT2(CONFIG).eval()
    documents = ids("1112223000", "0044444444", "1111111111", "0000000000")
    tokens = torch.randint(0, 97, documents.shape)
    read = (documents != 0) & (torch.rand(documents.shape) < 0.5)
    hidden = model(tokens, document_ids=documents)
    assert not hidden[documents == 0].any()
    states = model.states(tokens, Layout.of(documents, read=read))
    torch.testing.assert_close(states, hidden[read], atol=1e-6, rtol=0)
    gradients = []
    for result in (states, hidden[read]):
        model.zero_grad()
        result.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_padding_cannot_be_read() -> None:
    with pytest.raises(AssertionError, match="padding"):
        Layout.of(ids("110"), read=ids("011").bool())


def test_taking_and_putting_are_each_others_gradients() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 2])
    assert torch.equal(take(x, index), x[index])
    assert torch.equal(put(take(x, index), index, 5)[[1, 3]], torch.zeros(2, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: take(x, index), (x,))
    assert torch.autograd.gradcheck(lambda x: put(x, torch.tensor([6, 1, 0, 3, 2]), 8), (x,))


def test_micro_batches_hold_so_many_rows_or_tokens() -> None:
    lengths = torch.tensor([3, 4, 5, 20, 1, 1])
    assert [(r.start, r.stop) for r in row_ranges(lengths, 4)] == [(0, 4), (4, 6)]
    assert [(r.start, r.stop) for r in row_ranges(lengths, 4, 7)] == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert [(r.start, r.stop) for r in row_ranges(lengths, 1, 100)] == [(0, 6)]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16), ({"bf16": True}, torch.bfloat16)],
)
def test_a_cpu_without_bfloat16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert compute_type(torch.bfloat16, "cpu") == expected
    assert compute_type(torch.float32, "cpu") == torch.float32
    assert compute_type(torch.bfloat16, "cuda") == torch.bfloat16
