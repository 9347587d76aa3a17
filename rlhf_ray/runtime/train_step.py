"""The gradient of one batch and the facts of the held-out rows, over micro-batches and ranks.

A rank takes every n-th row of the batch, and the summed losses of its micro-batches are divided by the
weight of the whole batch.  Gradients are then summed over the ranks, so neither the size of a micro-batch
nor the number of ranks changes the result.

Left out on purpose: overlap of communication and backward pass, and sharding of weights; a rank holds the
whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_ray.objectives import Batch, Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Who computes: this rank, its device and number type, and how many others there are."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    """Type of the matrix products; weights and sums stay float32."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def alone(self) -> World:
        """The same device without the others."""
        return World(device=self.device, dtype=self.dtype)


def accumulate(
    objective: Objective, model: nn.Module, rows: Sequence[Any], world: World, *, micro_batch_size: int
) -> Tensor:
    """Add this rank's share of the gradient of the batch ``rows`` to the model; returns its share of the
    loss.

    Rows of like length go together: less padding, and about the same work for every rank.
    """
    weight = sum(row.weight for row in rows)
    total = torch.zeros((), device=world.device)
    for micro in _micro_batches(rows, world, micro_batch_size):
        with world.autocast():
            loss = objective.loss(model, _collate(objective, [rows[i] for i in micro], world)) / weight
        loss.backward()
        total += loss.detach()
    return total


def sum_gradients(model: nn.Module, extras: Tensor, world: World) -> Tensor:
    """Sum the gradients and the scalars ``extras`` (n,) over the ranks in one message; returns the summed
    extras.
    """
    if world.size == 1:
        return extras
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = world.sum(torch.cat([*(gradient.flatten() for gradient in gradients), extras]))
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
    return flat[start:]


@torch.no_grad()
def gather_facts(
    objective: Objective, model: nn.Module, rows: Sequence[Any], world: World, *, micro_batch_size: int
) -> Tensor:
    """(N, K) float64 on the CPU: the objective's facts of every row, in order, on every rank."""
    was_training = model.training
    model.eval()
    micro_batches = _micro_batches(rows, world, micro_batch_size)
    parts = []
    for micro in micro_batches:
        with world.autocast():
            parts.append(objective.facts(model, _collate(objective, [rows[i] for i in micro], world)))
    model.train(was_training)
    width = torch.tensor([parts[0].shape[1] if world.rank == 0 else 0], device=world.device)
    table = torch.zeros(len(rows), int(world.sum(width)), dtype=torch.float64, device=world.device)
    for micro, part in zip(micro_batches, parts, strict=True):
        table[micro] = part
    return world.sum(table).cpu()


def _micro_batches(rows: Sequence[Any], world: World, size: int) -> list[list[int]]:
    """Numbers of this rank's rows, the longest first, ``size`` at a time."""
    own = sorted(range(len(rows)), key=lambda i: -rows[i].length)[world.rank :: world.size]
    return [own[start : start + size] for start in range(0, len(own), size)]


def _collate(objective: Objective, rows: Sequence[Any], world: World) -> Batch:
    batch = objective.collate(rows)
    return {name: tensor.to(world.device, non_blocking=True) for name, tensor in batch.items()}
