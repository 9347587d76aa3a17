"""What an objective is: everything that the training loop does not know.

The loop deals in rows and batches without looking inside.  An objective reads its data, builds its model,
gives the sum of a batch's loss and the facts that its metrics are made of, and writes its model down.

Left out on purpose: optimisers, devices of other ranks, checkpoints and logging, which are the loop's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from rlhf_ray.tokenizer import Tokenizer

Batch = dict[str, Tensor]
"""One forward pass: tensors by name, rows first."""


class Row(Protocol):
    """One row of training data, tokenised."""

    @property
    def length(self) -> int:
        """Tokens that a forward pass reads."""
        ...

    @property
    def weight(self) -> float:
        """The row's share of the loss's denominator, above 0."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Rows to train on and rows to evaluate on; no prompt is in both."""

    train: Sequence[Any]
    held_out: Sequence[Any]
    counts: Mapping[str, int] = field(default_factory=dict)
    """What became of the data, in words: rows read, dropped, cut."""
    notes: Sequence[str] = ()
    """Where the rows came from, in lines for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is said about a finished model."""

    metrics: dict[str, float]
    lines: list[str]
    """For people."""


class Objective(Protocol):
    """What Ray Train minimises."""

    stage: str
    """Folder below the checkpoints."""
    metric: str
    """The metric of ``metrics`` that ranks checkpoints."""
    mode: Literal["max", "min"]
    """Which end of it is better."""
    row_kind: type[Any]
    """Dataclass of the rows; its fields are one-dimensional arrays, numbers and strings."""
    row_options: tuple[str, ...]
    """Fields of the configuration that decide what the rows of given files are."""
    config: Any
    """The stage's configuration; its ``data`` are the files of the rows."""
    tokenizer: Tokenizer

    def inputs(self) -> list[Path]:
        """Files that the result depends on; ValueError when one is missing."""
        ...

    def dataset(self) -> Dataset:
        """Read, split and tokenise; the same on every rank.  ValueError when no row is left to train on."""
        ...

    def build(self, device: torch.device) -> nn.Module:
        """The model before its first step, in float32; the same for equal torch seeds."""
        ...

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Whatever saving and reporting need, done before the first step by the rank that saves."""
        ...

    def finish(self, model: nn.Module, copy: nn.Module) -> None:
        """Give the copy, which ``save`` writes while training goes on, what must be measured on the model now."""
        ...

    def load(self, folder: Path, device: torch.device) -> nn.Module:
        """The model to go on training with, as ``save`` left it."""
        ...

    def collate(self, rows: Sequence[Any]) -> Batch:
        """A batch of rows, right-padded."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar: the sum of the batch's loss; its denominator is the sum of the rows' weights."""
        ...

    def facts(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, K) float64: what the metrics need to know of each row."""
        ...

    def metrics(self, facts: Tensor) -> dict[str, float]:
        """``eval/...`` metrics of facts (N, K)."""
        ...

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a Hugging Face folder: model, tokenizer and template."""
        ...

    def report(self, folder: Path, facts: Tensor, dataset: Dataset, device: torch.device) -> Report:
        """What to say about the model in ``folder``, whose facts on the held-out rows are (N, K)."""
        ...


def check_length(max_length: int, n_positions: int) -> None:
    """Raise ValueError when rows may be longer than the model's positions."""
    if max_length > n_positions:
        raise ValueError(
            f"max_length = {max_length} is more than the model's {n_positions} positions; give at most {n_positions}"
        )


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that decide what it says: weights and vocabulary."""
    weights = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("adapter/*.safetensors"))]
    return [*weights, folder / "vocab.json", folder / "merges.txt"]
