"""Copies of a learner's state in host memory, so that it can be written while learning goes on."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, nn

from rlhf_ray.models.quantised import FrozenEmbedding, FrozenLinear
from rlhf_ray.workers.sharding import in_host_memory

M = TypeVar("M", bound=nn.Module)


def shape_of_module(module: M) -> M:
    """The module without its values: what copies are made in the image of once it is sharded."""
    return _twin(module, [x.detach().to("meta") for x in _tensors(module)])


def copy_of_module(module: M, shape: M) -> M:
    """The module with whole parameters and buffers of its own, on the CPU; its device gets no second copy meanwhile.

    What is frozen, which nobody changes, stays the module's.  ``shape`` is the module itself, or what it was before it
    was sharded.
    """
    frozen = _frozen(module)
    return _twin(shape, [x if id(x) in frozen else in_host_memory(x) for x in _tensors(module)])


def copy_of_state(value: Any) -> Any:
    """Nested dicts, lists and tuples with a copy of every tensor, on the CPU."""
    if isinstance(value, Tensor):
        return in_host_memory(value)
    if isinstance(value, dict):
        return {key: copy_of_state(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_of_state(item) for item in value)
    return value


def _frozen(module: nn.Module) -> set[int]:
    """Identities of frozen parameters and of packed weights."""
    packed = [part for part in module.modules() if isinstance(part, (FrozenLinear, FrozenEmbedding))]
    fixed = [x for x in module.parameters() if not x.requires_grad]
    return {id(x) for x in (*fixed, *(buffer for part in packed for buffer in part.buffers()))}


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _twin(shape: M, tensors: Iterable[Tensor]) -> M:
    """The module with other parameters and buffers, in their order."""
    given = {
        id(old): nn.Parameter(new) if isinstance(old, nn.Parameter) and new is not old else new
        for old, new in zip(_tensors(shape), tensors, strict=True)
    }
    return deepcopy(shape, given)
