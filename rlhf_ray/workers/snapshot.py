"""Copies of a learner's state in host memory, so that it can be written while learning goes on."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copy_of_module(module: M) -> M:
    """The module with parameters and buffers of its own, on the CPU; its device gets no second copy meanwhile."""
    tensors = {id(x): nn.Parameter(copy_of_state(x)) for x in module.parameters()}
    buffers = {id(x): copy_of_state(x) for x in module.buffers()}
    return deepcopy(module, {**tensors, **buffers})


def copy_of_state(value: Any) -> Any:
    """Nested dicts, lists and tuples with a copy of every tensor, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_of_state(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_of_state(item) for item in value)
    return value
