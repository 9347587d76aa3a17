"""A GPT-2 in the form that plain torch generates with.

On a CPU every projection's weight is reordered once for oneDNN, adapters merged into it, and the GELU is fused: a
decode step is more than twice as fast in float32.  Elsewhere the model is used as it is, its adapters beside a base
that other processes may use too.  Left out on purpose: gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.models.gpt2 import GPT2, MLP
from rlhf_ray.models.lora import LoRALinear, sharing
from rlhf_ray.models.quantised import FrozenLinear
from rlhf_ray.models.scoring import autocast

ROWS_HINT = 64
"""Rows that the reordered layout is chosen for; any number of rows may be multiplied."""


class PackedLinear(nn.Module):
    """``nn.Linear`` on a reordered copy of its weight, optionally followed by the tanh GELU."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)
        self.bias = None if bias is None else bias.detach()
        self.post, self.variant = ("gelu", "tanh") if gelu else ("none", "")

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.post, [], self.variant)


class PackedGPT2(GPT2):
    """A GPT-2 whose head is packed too."""

    head: PackedLinear

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (..., V) of hidden states (..., D)."""
        return self.head(hidden).float()


def packable(model: GPT2) -> bool:
    """Whether this machine can reorder the model's weights."""
    weight = model.wte.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
    )


def pack(model: GPT2) -> PackedGPT2:
    """A copy for inference that shares the embeddings and norms, and holds the projections reordered."""
    packed: PackedGPT2 = sharing(model)  # type: ignore[assignment]
    packed.__class__ = PackedGPT2
    dtype = model.wte.weight.dtype
    for module in [module for module in packed.modules() if not isinstance(module, LoRALinear)]:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear | LoRALinear | FrozenLinear):
                gelu = isinstance(module, MLP) and name == "c_fc"
                setattr(module, name, PackedLinear(child.weight.to(dtype), child.bias.to(dtype), gelu=gelu))
        if isinstance(module, MLP):
            module.act = nn.Identity()
    packed.head = PackedLinear(model.wte.weight, None)
    return packed.eval()


class MixedGPT2(GPT2):
    """A GPT-2 that computes in its embeddings' type, whatever types its layers are kept in."""

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """As of any GPT-2."""
        with autocast(tokens.device, self.wte.weight.dtype):
            return super().forward(tokens, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (..., V) of hidden states (..., D)."""
        return super().logits(hidden.to(self.wte.weight.dtype))


def as_it_is(model: GPT2) -> GPT2:
    """A copy for inference that shares every weight."""
    runner = sharing(model)
    if any(parameter.dtype != model.wte.weight.dtype for parameter in model.parameters()):
        runner.__class__ = MixedGPT2
    return runner.eval()
