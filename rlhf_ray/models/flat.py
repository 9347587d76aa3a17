"""A model's parameters as one flat numpy buffer, the form in which weights travel between processes.

The order is that of ``named_parameters``; a tied weight appears once.  numpy has no bfloat16, so 16-bit
floats travel viewed as int16.  Buffers (a reward model's normaliser) are not parameters and don't travel.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

_VIEWS = {torch.float32: torch.float32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def flat_weights(model: nn.Module, *, dtype: torch.dtype | None = None) -> np.ndarray:
    """Every parameter in ``dtype`` (by default its own), (N,) float32, or int16 for 16-bit floats.

    ValueError when the parameters' dtypes differ.
    """
    own, size = _layout(model)
    dtype = dtype or own
    flat = torch.empty(size, dtype=dtype)
    for view, parameter in _pieces(flat, model):
        view.copy_(parameter.detach())
    return flat.view(_VIEWS[dtype]).numpy()


def load_flat_weights(model: nn.Module, buffer: np.ndarray) -> None:
    """Copy a buffer of ``flat_weights`` into the model in place; ValueError when it does not fit."""
    dtype, size = _layout(model)
    flat = torch.empty(size, dtype=dtype)
    target = flat.view(_VIEWS[dtype]).numpy()
    if buffer.shape != target.shape or buffer.dtype != target.dtype:
        raise ValueError(
            f"weights are {buffer.dtype}{list(buffer.shape)}, the model takes "
            f"{target.dtype}{list(target.shape)}: sender and receiver must have the same shape and dtype"
        )
    np.copyto(target, buffer)  # a buffer from shared memory is read-only, which torch can't wrap
    with torch.no_grad():
        for view, parameter in _pieces(flat, model):
            parameter.copy_(view)


def _layout(model: nn.Module) -> tuple[torch.dtype, int]:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= _VIEWS.keys():
        raise ValueError(f"parameter dtypes are {sorted(map(str, dtypes))}; flat weights need exactly one float type")
    return dtypes.pop(), sum(parameter.numel() for parameter in model.parameters())


def _pieces(flat: Tensor, model: nn.Module) -> list[tuple[Tensor, nn.Parameter]]:
    """Each parameter with its own range of flat, viewed in its shape."""
    parameters = list(model.parameters())
    ranges = flat.split([parameter.numel() for parameter in parameters])
    return [(part.view_as(parameter), parameter) for part, parameter in zip(ranges, parameters, strict=True)]
