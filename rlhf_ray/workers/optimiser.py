"""AdamW (Loshchilov and Hutter 2019) as every learner uses it: its moments in 32 or in 8 bits.

In 8 bits, 256 neighbours of a moment share a scale, their largest (Dettmers et al. 2022), and each is kept as the
fourth root of its share of that, a whole number of steps: fine near the largest, and eight decades deep, so that small
moments are kept too.  That takes the place of the paper's table of levels, whose look-up is most of a step on a CPU.
A second moment is never rounded to zero, where a step would have nothing to be divided by.  Arithmetic is float32, a
piece of a tensor at a time; tensors of less than ``SMALL`` numbers keep 32 bits.

Left out on purpose: optimisers with other state, and stochastic rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_ray.ops.adamw import AdamW

BLOCK = 256
"""Neighbours with one scale."""
SMALL = 4096
"""Tensors of fewer numbers are left in 32 bits."""
PIECE = {"cpu": 2**18, "cuda": 2**24}
"""Numbers that are float32 at a time; whole blocks."""
MOMENTS = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
"""AdamW's moments, and the type of their codes."""


def adamw(
    groups: Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    bits: int = 32,
    offload: bool = False,
) -> torch.optim.Optimizer:
    """AdamW over groups that each name their weight decay; moments of 32 or 8 ``bits``, in host memory if asked."""
    made = AdamW8bit if bits == 8 else AdamW
    optimiser = made(groups, lr=lr, betas=betas, eps=eps)
    if offload and any(x.is_cuda for group in optimiser.param_groups for x in group["params"]):
        HostMoments(optimiser)
    return optimiser


class HostMoments:
    """Keeps an optimiser's moments in pinned host memory, and on the GPU only while a step is made."""

    def __init__(self, optimiser: torch.optim.Optimizer) -> None:
        """Take them off the GPU after every step."""
        self._pinned: dict[tuple[Tensor, str], Tensor] = {}
        optimiser.register_step_pre_hook(lambda optimiser, *_: self._fetch(optimiser))
        optimiser.register_step_post_hook(lambda optimiser, *_: self._put_away(optimiser))

    def _fetch(self, optimiser: torch.optim.Optimizer) -> None:
        for parameter, state in optimiser.state.items():
            for name, x in state.items():
                if isinstance(x, Tensor) and x.ndim:  # the number of a step is where torch wants it
                    state[name] = x.to(parameter.device, non_blocking=True)

    def _put_away(self, optimiser: torch.optim.Optimizer) -> None:
        for parameter, state in optimiser.state.items():
            for name, x in state.items():
                if isinstance(x, Tensor) and x.ndim and x.is_cuda:
                    if (parameter, name) not in self._pinned:
                        self._pinned[parameter, name] = torch.empty_like(x, device="cpu", pin_memory=True)
                    state[name] = self._pinned[parameter, name].copy_(x, non_blocking=True)
        torch.cuda.current_stream().synchronize()  # whoever reads them next does not ask the GPU


def encode(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (n,) int8, or uint8 without sign, and scales (blocks,) float32 of x (n,) float32."""
    blocks = F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    roots = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).abs_().sqrt_().sqrt_()
    if signed:
        codes = roots.mul_(127).round_().copysign_(blocks).to(torch.int8)
    else:
        codes = roots.mul_(255).round_().clamp_(min=1).to(torch.uint8)
    return codes.flatten()[: len(x)], scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """(n,) float32: about what ``encode`` made codes (n,) and scales (blocks,) of."""
    roots = F.pad(codes, (0, -len(codes) % BLOCK)).view(-1, BLOCK).float()
    powers = roots.square().square_().copysign_(roots) if codes.dtype == torch.int8 else roots.square_().square_()
    most = torch.iinfo(codes.dtype).max
    return powers.mul_((scales / most**4)[:, None]).flatten()[: len(codes)]


class AdamW8bit(AdamW):
    """AdamW whose moments have 8 bits."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take parameters with their settings, of which the bits are one."""
        super().add_param_group({"bits": 8, **param_group})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter] or self._begin(parameter)
        state["step"] += 1
        flat, gradient = parameter.view(-1), parameter.grad.reshape(-1)  # type: ignore[union-attr]
        size = PIECE[flat.device.type]
        for start in range(0, len(flat), size):
            piece, blocks = slice(start, start + size), slice(start // BLOCK, (start + size) // BLOCK)
            moments = [self._read(state, name, piece, blocks) for name in MOMENTS]
            _advance(flat[piece], gradient[piece], *moments, step=state["step"], **group)
            for name, moment in zip(MOMENTS, moments, strict=True):
                self._write(state, name, piece, blocks, moment)

    def _begin(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Moments of zero."""
        state = self.state[parameter]
        state["step"] = 0
        for name, dtype in MOMENTS.items():
            if parameter.numel() < SMALL:
                state[name] = torch.zeros(parameter.shape, device=parameter.device)
            else:
                state[name] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
                state[f"{name}_scales"] = parameter.new_zeros(math.ceil(parameter.numel() / BLOCK))
        return state

    def _read(self, state: dict[str, Any], name: str, piece: slice, blocks: slice) -> Tensor:
        held = state[name].view(-1)[piece]
        return held if held.dtype == torch.float32 else decode(held, state[f"{name}_scales"][blocks])

    def _write(self, state: dict[str, Any], name: str, piece: slice, blocks: slice, moment: Tensor) -> None:
        held = state[name].view(-1)[piece]
        if held.dtype != torch.float32:
            codes, state[f"{name}_scales"][blocks] = encode(moment, signed=held.dtype == torch.int8)
            held.copy_(codes)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state as it is: codes stay codes, which torch would turn into the parameters' type."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, held in state_dict["state"].items():
            device = parameters[number].device
            self.state[parameters[number]] = {
                name: x.to(device) if isinstance(x, Tensor) else x for name, x in held.items()
            }


def _advance(
    x: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    **_: Any,
) -> None:
    """One step of x (n,) and its moments, in place."""
    beta1, beta2 = betas
    x.mul_(1 - lr * weight_decay)
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    scale = (second.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    x.addcdiv_(first, scale, value=-lr / (1 - beta1**step))
