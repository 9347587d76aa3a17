"""What a training run writes down: a copy of its model and optimiser, how far it is, on what inputs, and its closing
report.

Left out on purpose: generators and data positions; both follow from seed and step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from rlhf_ray.checkpoint import save_tree
from rlhf_ray.rundir.files import read_json, replace_text

FOLDER = "trainer"
"""Below a checkpoint, apart from the model's files, so that whoever opens the model sees the model alone."""
REPORT = "report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """How far a checkpoint is."""

    step: int
    total_steps: int
    tokens: int
    """Tokens trained on so far."""
    inputs: str
    """Digest of the files that the run is trained on."""
    window: dict[str, list[float]] = field(default_factory=dict)
    """The `Window` of the steps since the last line of metrics."""

    def write(self, checkpoint: Path) -> None:
        """Write ``trainer/state.json``."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        (checkpoint / FOLDER / "state.json").write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path) -> TrainState:
        """Read what ``write`` wrote; ValueError when it is not there."""
        return cls(**read_json(checkpoint / FOLDER / "state.json"))


def optimiser_path(checkpoint: Path) -> Path:
    """Where a checkpoint keeps its optimiser, for save_tree and load_tree."""
    return checkpoint / FOLDER / "optimiser"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A run after one of its steps, in host memory, to be written while it goes on."""

    model: nn.Module
    optimiser: dict[str, Any]
    state: TrainState

    def write(self, checkpoint: Path) -> None:
        """Write everything but the model, whose format the objective knows."""
        optimiser_path(checkpoint).parent.mkdir()
        save_tree(optimiser_path(checkpoint), self.optimiser)
        self.state.write(checkpoint)


def digest(files: Sequence[Path]) -> str:
    """SHA-256 over the contents of files, in order; ValueError naming one that can't be read."""
    total = hashlib.sha256()
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosingReport:
    """What a complete run says about its model, so that running it again can say it again."""

    step: int
    inputs: str
    lines: list[str]

    def write(self, run: Path) -> None:
        """Write ``report.json``, which makes a run complete."""
        replace_text(run / REPORT, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, run: Path) -> ClosingReport | None:
        """The report of a run's folder, None before there is one."""
        return cls(**read_json(run / REPORT)) if (run / REPORT).is_file() else None
