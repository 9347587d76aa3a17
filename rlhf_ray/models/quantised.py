"""Weights that never learn, kept in fewer bits: bfloat16, 8-bit or 4-bit integers with scales of their own.

An output channel of a linear layer and a token of the embedding are rows of a matrix.  int8 is symmetric with one
scale a row (Dettmers et al. 2022, LLM.int8(), without its outliers); int4 has one a group of 32 columns.  Activations
stay what they are: a block of rows at a time is unpacked into the type of the product, forward and backward, so a
model is never unpacked whole, and gradients reach what is before a frozen layer.  Biases, norms and positions, some
hundredth of a model, are left alone.

Left out on purpose: products in integers, calibration on data, and training of what is kept like this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_ray.models.gpt2 import GPT2, Block
from rlhf_ray.ops.logprobs import product_type

GROUP = 32
"""Columns that share a scale in int4."""
BLOCK = {"cpu": 2**20, "cuda": 2**24}
"""Numbers that are unpacked at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A matrix (N, K) of which rows are asked for."""

    codes: Tensor
    """(N, K) bfloat16 or int8; (N, K / 2) uint8 where one byte holds two columns, k and K / 2 + k."""
    scales: Tensor
    """(N, groups) float32; (N, 0) for bfloat16."""

    @classmethod
    def of(cls, x: Tensor, kind: str) -> Packed:
        """A matrix (N, K) as bfloat16, int8 or int4; ValueError when 32 does not divide K for the last."""
        if kind == "bfloat16":
            return cls(x.to(torch.bfloat16).contiguous(), x.new_empty(len(x), 0, dtype=torch.float32))
        if kind == "int4" and x.shape[1] % GROUP:
            raise ValueError(
                f"memory.frozen = int4 needs a width that {GROUP} divides; this model has one of {x.shape[1]}"
            )
        codes, scales = zip(*(_rounded(rows, kind) for rows in x.split(_rows_at_once(x))), strict=True)
        return cls(torch.cat(codes), torch.cat(scales))

    @classmethod
    def blank(cls, x: Tensor, kind: str) -> Packed:
        """What ``of`` makes of a matrix (N, K), its values yet to come, on torch's meta device."""
        N, K = x.shape
        columns, groups = {"bfloat16": (K, 0), "int8": (K, 1), "int4": (K // 2, K // GROUP)}[kind]
        dtype = {"bfloat16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}[kind]
        return cls(torch.empty(N, columns, dtype=dtype, device="meta"), torch.empty(N, groups, device="meta"))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.codes.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that it has for others."""
        return torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        N, K = self.codes.shape
        return N, 2 * K if self.codes.dtype == torch.uint8 else K

    def __len__(self) -> int:
        return len(self.codes)

    def rows(self, which: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The given rows (n, K) in ``dtype``."""
        codes, scales = self.codes[which], self.scales[which]
        if codes.dtype == torch.bfloat16:
            return codes.to(dtype)
        if codes.dtype == torch.uint8:
            codes = torch.cat([codes & 15, codes >> 4], dim=1).to(torch.int8) - 8
        groups = codes.view(*scales.shape, -1) * scales[..., None]
        return groups.view(len(codes), -1).to(dtype)

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """All rows, a block at a time, and where they are."""
        size = _rows_at_once(self)
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            yield rows, self.rows(rows, dtype)

    def float(self) -> Tensor:
        """The whole matrix (N, K) in float32."""
        return self.rows(slice(None))


def _rows_at_once(x: Tensor | Packed) -> int:
    """Rows of a matrix (N, K) that are a block."""
    return max(1, BLOCK[x.device.type] // x.shape[1])


def _rounded(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix (N, K) as int8 or int4."""
    N, K = x.shape
    groups = x.float().reshape(N, 1 if kind == "int8" else K // GROUP, -1)  # (N, groups, columns)
    scales = groups.abs().amax(2) / {"int8": 127, "int4": 7}[kind]  # (N, groups)
    codes = (groups / scales.clamp(min=1e-30)[..., None]).round_().to(torch.int8).view(N, K)
    if kind == "int4":
        low, high = (codes + 8).to(torch.uint8).chunk(2, dim=1)
        codes = low | high << 4
    return codes, scales


class _Frozen(nn.Module):
    """A module whose weight is packed."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Packed) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)

    @property
    def packed(self) -> Packed:
        """The matrix."""
        return Packed(self.codes, self.scales)


class FrozenLinear(_Frozen):
    """A linear layer that does not learn; what is before it does."""

    def __init__(self, weight: Packed, bias: Tensor) -> None:
        super().__init__(weight)
        self.bias = nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """(out, in) float32, unpacked at every look."""
        return self.packed.float()

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.packed.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in autocast's type."""
        out: Tensor = _Product.apply(x, self.packed, product_type(x.device))
        return out + self.bias.to(out.dtype)


class FrozenEmbedding(_Frozen):
    """An embedding that does not learn, and the head's weight."""

    @property
    def weight(self) -> Packed:
        """What the head and those who ask for its device and type are given."""
        return self.packed

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., K) float32."""
        return self.packed.rows(tokens.flatten()).view(*tokens.shape, -1)


class _Product(torch.autograd.Function):
    """x (..., K) times the transpose of a packed matrix (N, K): (..., N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed, dtype: torch.dtype) -> Tensor:
        ctx.weight, ctx.type = weight, x.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        out = flat.new_empty(len(flat), len(weight))  # before the blocks, which then leave no holes below it
        for rows, block in weight.blocks(dtype):
            if len(block) == len(weight):
                torch.mm(flat, block.t(), out=out)
            else:
                out[:, rows] = flat @ block.t()
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        flat = gradient.reshape(-1, gradient.shape[-1])
        by_x = flat.new_zeros(len(flat), ctx.weight.shape[1])
        for rows, block in ctx.weight.blocks(flat.dtype):
            by_x.addmm_(flat[:, rows], block)
        return by_x.view(*gradient.shape[:-1], -1).to(ctx.type), None, None


def freeze(model: GPT2, kind: str, device: torch.device | str) -> None:
    """Pack every projection and the embedding of a model, one after the other; all of it goes to ``device``."""
    _replace(model, kind, lambda weight, kept: Packed.of(weight.to(device), kept))
    model.to(device).requires_grad_(False)


def freeze_blank(model: GPT2, kind: str) -> None:
    """Give a model without values the modules of a frozen one, without values too."""
    _replace(model, kind, Packed.blank)


def packed_kind(owner: str, kind: str) -> str:
    """How the matrix of a module is packed in a model that is frozen as ``kind``: the embedding in 8 bits at least."""
    return "int8" if owner == "wte" and kind == "int4" else kind


def _replace(model: GPT2, kind: str, pack: Callable[[Tensor, str], Packed]) -> None:
    """Have packed modules in the place of every projection and of the embedding."""
    for block in model.h:
        assert isinstance(block, Block)
        for part in (block.attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    weight = pack(linear.weight.detach(), packed_kind(name, kind))
                    setattr(part, name, FrozenLinear(weight, linear.bias.detach()))
    table = pack(model.wte.weight.detach(), packed_kind("wte", kind))
    model.wte = FrozenEmbedding(table)  # type: ignore[assignment]
