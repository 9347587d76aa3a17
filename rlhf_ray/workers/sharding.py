"""Modules whose parameters are shared out among the ranks of a group (FSDP2), and the way to whole tensors and back.

A block's parameters are put together while it computes; those of the root (embeddings, last norm, heads) stay
together from the forward pass to the end of the backward pass, because the tied embedding is read after the forward
pass as well.  Gradients are summed over the ranks, never averaged.

What torch needs for this takes most of a second to import, so that is done where something is sharded.

Left out on purpose: offloading to host memory, and meshes of more than one dimension.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard(module: nn.Module, blocks: Iterable[nn.Module], *, forward: str) -> None:
    """Keep this rank's part of every parameter; ``forward`` names the method that computes.

    All ranks call this at once, with the same parameters.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for part in (*blocks, module):
        sharded = fully_shard(part, reshard_after_forward=part is not module)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(module, forward)


def rest(*sharded: Any) -> None:
    """Hold this rank's part alone again, after forward passes that no backward pass has followed."""
    for module in sharded:
        module.reshard()


def is_part(x: Tensor) -> bool:
    """Whether other ranks hold other parts of the tensor."""
    return type(x) not in (Tensor, nn.Parameter)


def whole(x: Tensor) -> Tensor:
    """A tensor of which this rank may hold a part; all ranks call this at once."""
    return x.full_tensor() if is_part(x) else x  # type: ignore[attr-defined]


def in_host_memory(x: Tensor) -> Tensor:
    """A copy of the whole tensor; if each rank holds a part, in the first one's memory, and empty on the others."""
    if not is_part(x):
        return x.detach().to("cpu", copy=True)
    together = whole(x.detach())
    return together.to("cpu") if dist.get_rank() == 0 else torch.empty(0)


def join_in(tensors: Iterable[Tensor]) -> None:
    """Take part while the first rank puts these together."""
    for x in tensors:
        whole(x)


def like(x: Tensor, held: Tensor) -> Tensor:
    """A whole tensor as this rank holds another one of its shape; of another shape, such as a counter, as it is."""
    if not is_part(held) or x.shape != held.shape:
        return x
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(held, DTensor)
    return distribute_tensor(x.to(held.device), held.device_mesh, held.placements, src_data_rank=None)


def load_whole(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a module's whole state, each rank its part; what is not given stays untouched."""
    held = module.state_dict()
    module.load_state_dict({name: like(x, held[name]) for name, x in state.items()}, strict=False)


def load_whole_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's whole state, each rank its part."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    moments = {
        number: {name: like(x, parameters[number]) for name, x in entries.items()}
        for number, entries in state["state"].items()
    }
    optimiser.load_state_dict({**state, "state": moments})
