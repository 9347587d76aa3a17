"""Two networks at once, and the optimiser's step, beside the plain ways."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.ops.adamw import AdamW
from rlhf_ray.workers.beside import beside


@pytest.fixture(autouse=True)
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8))


def gradients(*networks: nn.Module) -> list[Tensor]:
    found = [p.grad for module in networks for p in module.parameters()]
    for module in networks:
        module.zero_grad()
    return found  # type: ignore[return-value]


def test_two_at_once_say_and_learn_what_each_does_alone() -> None:
    one, other, x = network(1), network(2), torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    threads: list[int] = []

    def first() -> tuple[Tensor, ...]:
        threads.append(torch.get_num_threads())
        return one(x), one(-x)

    def second() -> tuple[Tensor, ...]:
        return (other(x),)

    (a, b), (c,) = beside(first, second)
    (a * b + c).square().sum().backward()
    together = gradients(one, other)
    torch.set_num_threads(2)
    (one(x) * one(-x) + other(x)).square().sum().backward()
    assert threads == [2]
    assert all(torch.equal(x, y) for x, y in zip(together, gradients(one, other), strict=True))
    assert torch.equal(a, one(x)) and torch.equal(c, other(x))


def test_nothing_is_kept_where_no_gradient_is_to_come() -> None:
    with torch.no_grad():
        (a,), (b,) = beside(lambda: (network(1)(torch.ones(2, 64)),), lambda: (network(2)(torch.ones(2, 64)),))
    assert not (a.requires_grad or b.requires_grad) and torch.get_num_threads() == 4


def test_what_one_network_raises_is_raised() -> None:
    def fails() -> tuple[Tensor, ...]:
        raise ValueError("row too long")

    with pytest.raises(ValueError, match="row too long"):
        beside(fails, lambda: (torch.ones(1, requires_grad=True),))


def test_adamw_is_torch_s_own() -> None:
    ours, theirs, again = network(1), network(1), network(1)

    def made(kind: type[torch.optim.Optimizer], module: nn.Module, **more: bool) -> torch.optim.Optimizer:
        (*_, last), settings = list(module.parameters()), {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-5, **more}
        first = {"params": list(module.parameters())[:-1], "weight_decay": 0.1, "lr": 0.05}
        return kind([first, {"params": [last], "weight_decay": 0.0}], **settings)  # type: ignore[arg-type]

    pairs = [(made(AdamW, ours), ours), (made(torch.optim.AdamW, theirs, fused=True), theirs)]
    for step in range(3):
        for optimiser, module in pairs:
            module(torch.full((4, 64), 0.1 * step)).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), theirs.parameters(), strict=True))
    state, other = (optimiser.state_dict() for optimiser, _ in pairs)
    assert state["state"].keys() == other["state"].keys() and other["state"][3].keys() == state["state"][3].keys()
    assert [group["params"] for group in state["param_groups"]] == [[0, 1, 2], [3]]
    again.load_state_dict(ours.state_dict())
    resumed = made(AdamW, again)
    resumed.load_state_dict(other)
    for optimiser, module in ((pairs[0][0], ours), (resumed, again)):
        module(torch.ones(4, 64)).square().sum().backward()
        optimiser.step()
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), again.parameters(), strict=True))
