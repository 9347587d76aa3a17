"""AdamW (Loshchilov and Hutter 2019) by torch's fused kernel: the same numbers and the same saved state as torch's own.

torch's own imports its compiler when it is made, which takes two seconds of every start.

Left out on purpose: AMSGrad, maximising, closures, and learning rates that are tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTS = "exp_avg", "exp_avg_sq"


class AdamW(torch.optim.Optimizer):
    """Fused AdamW over groups of parameters, each of which names its ``weight_decay`` and may name its own ``lr``."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take parameters with their settings."""
        self.param_groups.append({**self.defaults, **param_group})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if not trained:
                continue
            states = [self._state(p) for p in trained]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            firsts, seconds = ([state[name] for state in states] for name in MOMENTS)
            torch._fused_adamw_(
                trained,
                [p.grad for p in trained],
                firsts,
                seconds,
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        assert set_to_none
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Settings and moments, with numbers in place of the parameters, counted through all groups."""
        number = {id(p): n for n, p in enumerate(p for group in self.param_groups for p in group["params"])}
        groups = [{**group, "params": [number[id(p)] for p in group["params"]]} for group in self.param_groups]
        return {"state": {number[id(p)]: state for p, state in self.state.items()}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` said of parameters of the same shapes in the same groups."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: saved[name] for name in group if name != "params"})
        self.state.clear()
        for number, saved in state_dict["state"].items():
            held = parameters[number]
            self.state[held] = {name: x.to(held.device, torch.float32) for name, x in saved.items()}
