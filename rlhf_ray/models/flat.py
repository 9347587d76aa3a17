"""A model's parameters as one flat numpy buffer, the form in which weights travel between processes, or as one flat
tensor, where these share a card.

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
    fill_flat(torch.from_numpy(buffer).view(dtype), model, read)
    return buffer


def empty_flat(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(N,) in ``dtype`` on a device, which `fill_flat` fills."""
    return torch.empty(_layout(model)[1], dtype=dtype, device=device)


def fill_flat(flat: Tensor, model: nn.Module, read: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """Write every parameter into a flat tensor (N,), as `flat_weights` does into a buffer."""
    for view, parameter in _pieces(flat, model):
        view.copy_(read(parameter.detach()))


def as_buffer(flat: Tensor) -> np.ndarray:
    """A flat tensor in host memory as a buffer of ``flat_weights``."""
    return (flat if flat.dtype == torch.float32 else flat.view(torch.int16)).numpy()


def load_flat_weights(model: nn.Module, weights: np.ndarray | Tensor) -> None:
    """Copy a buffer of ``flat_weights``, or a flat tensor, into the model in place; ValueError when it does not fit."""
    dtype, size = _layout(model)
    taken = dtype if isinstance(weights, Tensor) else np.dtype(_CARRIERS[dtype])
    if weights.shape != (size,) or weights.dtype != taken:
        raise ValueError(
            f"weights are {weights.dtype}{list(weights.shape)}, the model takes {taken}[{size}]: "
            "sender and receiver must have the same shape and dtype"
        )
    # shared memory is read-only, which from_numpy warns of
    flat = weights if isinstance(weights, Tensor) else torch.from_dlpack(weights).view(dtype)
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
