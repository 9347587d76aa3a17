"""A model's parameters as one flat numpy buffer, the form in which weights travel between processes.

The order is that of ``named_parameters``; a tied weight appears once.  numpy has no bfloat16, so 16-bit
floats travel viewed as int16.  Buffers (a reward model's normaliser) are not parameters and don't travel.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

_CARRIERS = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.float16: np.int16}


def flat_weights(
    model: nn.Module, *, dtype: torch.dtype | None = None, read: Callable[[Tensor], Tensor] = lambda x: x
) -> np.ndarray:
    """Every parameter in ``dtype`` (by default its own), (N,) float32, or int16 for 16-bit floats.

    ``read`` gives a parameter's whole value, where the model holds a part of it.  ValueError when the parameters'
    dtypes differ.
    """
    own, size = _layout(model)
    dtype = dtype or own
    buffer = np.empty(size, dtype=_CARRIERS[dtype])  # in huge pages, which torch does not ask for: half the time
    for view, parameter in _pieces(torch.from_numpy(buffer).view(dtype), model):
        view.copy_(read(parameter.detach()))
    return buffer


def load_flat_weights(model: nn.Module, buffer: np.ndarray) -> None:
    """Copy a buffer of ``flat_weights`` into the model in place; ValueError when it does not fit."""
    dtype, size = _layout(model)
    carrier = np.dtype(_CARRIERS[dtype])
    if buffer.shape != (size,) or buffer.dtype != carrier:
        raise ValueError(
            f"weights are {buffer.dtype}{list(buffer.shape)}, the model takes {carrier}[{size}]: "
            "sender and receiver must have the same shape and dtype"
        )
    flat = torch.from_dlpack(buffer).view(dtype)  # shared memory is read-only, which from_numpy warns of
    with torch.no_grad():
        for view, parameter in _pieces(flat, model):
            parameter.copy_(view)


def _layout(model: nn.Module) -> tuple[torch.dtype, int]:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= _CARRIERS.keys():
        raise ValueError(f"parameter dtypes are {sorted(map(str, dtypes))}; flat weights need exactly one float type")
    return dtypes.pop(), sum(parameter.numel() for parameter in model.parameters())


def _pieces(flat: Tensor, model: nn.Module) -> list[tuple[Tensor, nn.Parameter]]:
    """Each parameter with its own range of flat, viewed in its shape."""
    parameters = list(model.parameters())
    ranges = flat.split([parameter.numel() for parameter in parameters])
    return [(part.view(parameter.shape), parameter) for part, parameter in zip(ranges, parameters, strict=True)]
