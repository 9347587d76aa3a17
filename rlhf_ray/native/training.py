"""Attention and GELU of training passes on a CPU, compiled, with their gradients.

torch's own attention on a CPU is made for long rows: on those of a few dozen tokens it reaches a tenth of what matrix
products reach, and it wants documents padded to rows.  Its tanh GELU takes one number at a time in all but name.

Left out on purpose: types other than float32, and second derivatives.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_ray.native.build import build_problem, library

LANES = 16
"""Floats of one vector; head dimensions are multiples of it."""


@lru_cache(maxsize=1)
def _compiled() -> bool:
    return not build_problem()


def serves(x: Tensor) -> bool:
    """Whether the compiled functions take this tensor: float32 on a CPU, outside of ``torch.compile``."""
    held = type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.dtype == torch.float32
    return held and not torch.compiler.is_compiling() and _compiled()


def _call(name: str, *arguments: Tensor | int) -> None:
    values = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_int64(x) for x in arguments]
    library()[name](*values, torch.get_num_threads())


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bounds: Tensor) -> Tensor:
        N, _, H, d = qkv.shape
        qkv = qkv.contiguous()
        out, log_mass = qkv.new_empty(N, H, d), qkv.new_empty(N, H)
        _call("attention", qkv, bounds, len(bounds) - 1, H, d, out, log_mass)
        ctx.save_for_backward(qkv, bounds, out, log_mass)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor, None]:
        qkv, bounds, out, log_mass = ctx.saved_tensors
        H, d = qkv.shape[2:]
        by_qkv, by_out = torch.empty_like(qkv), by_out.contiguous()
        _call("attention_backward", qkv, bounds, len(bounds) - 1, H, d, out, log_mass, by_out, by_qkv)
        return by_qkv, None


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        _call("gelu_forward", x, x.numel(), out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        by_x, by_out = torch.empty_like(x), by_out.contiguous()
        _call("gelu_backward", x, by_out, x.numel(), by_x)
        return by_x


def attention(qkv: Tensor, bounds: Tensor) -> Tensor:
    """Causal attention inside documents: qkv (N, 3, H, d) -> (N, H, d), scaled by 1 / sqrt(d).

    ``bounds`` (documents + 1,) int64: document i is the tokens from bounds[i] to bounds[i + 1].  The head dimension is
    a multiple of ``LANES``.
    """
    assert qkv.shape[-1] % LANES == 0 and bounds.dtype == torch.int64, (qkv.shape, bounds.dtype)
    out: Tensor = _Attention.apply(qkv, bounds)
    return out


def gelu(x: Tensor) -> Tensor:
    """The tanh GELU (Hendrycks and Gimpel 2016) of every number."""
    out: Tensor = _GELU.apply(x)
    return out
