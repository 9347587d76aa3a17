"""Low-rank adapters (Hu et al. 2021): y = W x + alpha / rank * B A x, where W is frozen and A and B learn.

B starts at zero, so an adapted model begins as its base, to the bit.  An adapted model shares its base's weights: the
base is still there as it was, and serves as the reference of reinforcement learning without a second copy.  ``merged``
gives plain layers W + alpha / rank * B A, always from W itself, so that nothing adds up over many of them.

Left out on purpose: dropout between x and A, adapters of embeddings and norms, and ranks that differ by layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_ray.config.lora import LoRA, Target
from rlhf_ray.models.gpt2 import GPT2, Block
from rlhf_ray.models.quantised import FrozenEmbedding, FrozenLinear

M = TypeVar("M", bound=nn.Module)

LAYERS: dict[Target, tuple[str, str]] = {
    "attention_in": ("attn", "c_attn"),
    "attention_out": ("attn", "c_proj"),
    "mlp_in": ("mlp", "c_fc"),
    "mlp_out": ("mlp", "c_proj"),
}
"""Where a block has each target."""


class LoRALinear(nn.Module):
    """A linear layer, its weight whole, packed or adapted already, and its adapter."""

    base: nn.Linear | FrozenLinear | LoRALinear
    in_features: int
    out_features: int

    def __init__(self, base: nn.Linear | FrozenLinear | LoRALinear, lora: LoRA, generator: torch.Generator) -> None:
        """A is uniform within 1 / sqrt(in), B zero; both float32, on the base's device."""
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        device, bound = base.bias.device, 1 / math.sqrt(self.in_features)
        self.base = base
        self.scale = lora.alpha / lora.rank
        narrow = torch.empty(lora.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(narrow.to(device))
        self.B = nn.Parameter(torch.zeros(self.out_features, lora.rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out = self.base(x)
        narrow = F.linear(x, self.A)  # (..., rank)
        wide = self.B.t().to(narrow.dtype)
        return out.flatten(0, -2).addmm_(narrow.flatten(0, -2), wide, alpha=self.scale).view(out.shape)

    @property
    @torch.no_grad()
    def weight(self) -> Tensor:
        """The merged weight (out, in), made anew at every look, in the base's type and where the adapter is."""
        weight = self.base.weight
        whole = torch.addmm(weight.float().to(self.B.device), self.B, self.A, alpha=self.scale)
        return whole.to(weight.dtype)

    @property
    def bias(self) -> Tensor:
        """The base's (out,)."""
        return self.base.bias


class _Plain(nn.Linear):
    """A linear layer that is given its weight and bias, and draws none."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], device="meta")
        self.weight, self.bias = nn.Parameter(weight, False), nn.Parameter(bias.detach(), False)

    def reset_parameters(self) -> None:
        """Nothing."""


def with_adapters(base: GPT2, lora: LoRA, *, seed: int) -> GPT2:
    """A model with new adapters that shares the weights of ``base``, which are frozen from now on.

    Equal seeds give equal adapters, on any device.
    """
    adapted = sharing(base.requires_grad_(False))
    generator = torch.Generator().manual_seed(seed)
    for block in adapted.h:
        assert isinstance(block, Block)
        for owner, name in (LAYERS[target] for target in LAYERS if target in lora.targets):
            part = getattr(block, owner)
            setattr(part, name, LoRALinear(getattr(part, name), lora, generator))
    return adapted


def adapted_layers(module: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every layer with an adapter and its name, in the model's order; of two adapters at one place the later one."""
    inner = {id(layer.base) for layer in module.modules() if isinstance(layer, LoRALinear)}
    parts = module.named_modules()
    return ((name, layer) for name, layer in parts if isinstance(layer, LoRALinear) and id(layer) not in inner)


def published(policy: GPT2) -> nn.Module:
    """What of a policy has to travel: all A and B of one with adapters, else the policy."""
    parameters = [parameter for _, layer in adapted_layers(policy) for parameter in (layer.A, layer.B)]
    return nn.ParameterList(parameters) if parameters else policy


def merged(module: M) -> M:
    """The module with plain layers for adapted and for packed ones, all other weights shared; itself without any."""
    if not any(isinstance(part, (LoRALinear, FrozenLinear)) for part in module.modules()):
        return module
    plain = sharing(module)
    for part in list(plain.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, LoRALinear | FrozenLinear) and not isinstance(part, LoRALinear):
                weight = child.weight if isinstance(child, LoRALinear) else child.weight.float()
                setattr(part, name, _Plain(weight, child.bias))
            elif isinstance(child, FrozenEmbedding):
                setattr(part, name, nn.Embedding.from_pretrained(child.weight.float()))
    return plain


def with_plain_embeddings(model: GPT2, dtype: torch.dtype) -> GPT2:
    """The model with embeddings in ``dtype`` that are packed no longer, all else shared."""
    plain = sharing(model)
    for name in ("wte", "wpe"):
        table = getattr(model, name).weight.float().to(dtype)
        setattr(plain, name, nn.Embedding.from_pretrained(table.detach()))
    return plain


def learned_state(module: nn.Module) -> dict[str, Tensor]:
    """What learning changes of a module's state: everything, or beside frozen weights the parameters that are not."""
    state = dict(module.state_dict())
    if all(parameter.requires_grad for parameter in module.parameters()):
        return state
    return {name: state[name] for name, parameter in module.named_parameters() if parameter.requires_grad}


def sharing(module: M) -> M:
    """A copy with the very parameters and buffers of the module."""
    return copy.deepcopy(module, {id(x): x for x in (*module.parameters(), *module.buffers())})
