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

from rlhf_ray.models.scoring import row_ranges
from rlhf_ray.objectives import Batch, Objective
from rlhf_ray.shortage import Portion


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Who computes: this rank, its device and number type, and how many others there are."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    """Type of the matrix products; weights and sums stay float32."""

    @property
    def dtype_name(self) -> str:
        """The type as the configuration writes it."""
        return str(self.dtype).removeprefix("torch.")

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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """What one rank needs for one optimiser step."""

    batches: list[Batch]
    """This rank's micro-batches, in host memory; pinned where the device is another."""
    weight: float
    """Of the whole step, over all ranks: the denominator of the loss."""
    tokens: int
    """Of the whole step."""


def step_input(objective: Objective, rows: Sequence[Any], world: World, portion: Portion) -> StepInput:
    """This rank's share of the batch ``rows``.

    Rows of like length go together: less padding, and about the same work for every rank.
    """
    micro_batches = _micro_batches(rows, world, portion)
    return StepInput(
        batches=[_collate(objective, [rows[i] for i in micro], world) for micro in micro_batches],
        weight=sum(row.weight for row in rows),
        tokens=sum(row.length for row in rows),
    )


def accumulate(objective: Objective, model: nn.Module, inputs: StepInput, world: World) -> Tensor:
    """Add this rank's share of a step's gradient to the model; returns its share of the loss."""
    total = torch.zeros((), device=world.device)
    for batch in inputs.batches:
        with world.autocast():
            loss = objective.loss(model, _on_device(batch, world)) / inputs.weight
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
def gather_facts(objective: Objective, model: nn.Module, rows: Sequence[Any], world: World, portion: Portion) -> Tensor:
    """(N, K) float64 on the CPU: the objective's facts of every row, in order, on every rank."""
    was_training = model.training
    model.eval()

    def measure() -> list[tuple[list[int], Tensor]]:
        parts = []
        for micro in _micro_batches(rows, world, portion):
            with world.autocast():
                batch = _collate(objective, [rows[i] for i in micro], world)
                parts.append((micro, objective.facts(model, _on_device(batch, world))))
        return parts

    parts = portion.attempt(measure, lambda: torch.tensor([row.length for row in rows]))
    model.train(was_training)
    width = torch.tensor([parts[0][1].shape[1] if world.rank == 0 else 0], device=world.device)
    table = torch.zeros(len(rows), int(world.sum(width)), dtype=torch.float64, device=world.device)
    for micro, part in parts:
        table[micro] = part
    return world.sum(table).cpu()


def _micro_batches(rows: Sequence[Any], world: World, portion: Portion) -> list[list[int]]:
    """Numbers of this rank's rows, the longest first, a portion at a time."""
    own = sorted(range(len(rows)), key=lambda i: -rows[i].length)[world.rank :: world.size]
    lengths = torch.tensor([rows[i].length for i in own])
    return [own[cut] for cut in row_ranges(lengths, portion.rows, portion.tokens)] if own else []


def _collate(objective: Objective, rows: Sequence[Any], world: World) -> Batch:
    batch = objective.collate(rows)
    if world.device.type == "cpu":
        return batch
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


def _on_device(batch: Batch, world: World) -> Batch:
    return {name: tensor.to(world.device, non_blocking=True) for name, tensor in batch.items()}
