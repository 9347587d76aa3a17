"""A run in TensorBoard: every number of metrics.jsonl, histograms, some answers, and the settings (HParams).

Events of steps that a resumed run does again are struck out by TensorBoard itself, by the writer's ``purge_step``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

SHOWN_ANSWERS = 4
CLOCKS = ("time/", "perf/")


class Board:
    """The event file of one start of a run."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], purge_step: int | None) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
        self._settings: dict[str, Any] | None = flat(settings)

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        """Write a step's numbers, and before the first ones the settings that they are compared under."""
        if self._settings:
            results = {name: 0.0 for name in row if not name.startswith(CLOCKS)}
            for part in hparams(self._settings, results):
                self._writer._get_file_writer().add_summary(part)
            self._settings = None
        for name, value in row.items():
            self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Write how values are spread."""
        for name, value in values.items():
            finite = value[value.isfinite()].float()
            if len(finite):
                self._writer.add_histogram(name, finite, step)

    def answers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the first few rows of the samples as a table."""
        columns = list(rows[0])
        lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines[: SHOWN_ANSWERS + 2])
        self._writer.add_text("samples", text, step)

    def close(self) -> None:
        """Write what is left and close the file."""
        self._writer.close()


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``ppo.lr``, what HParams can't hold as text."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def _cell(value: object) -> str:
    """A value for a cell of a Markdown table, its text as it is."""
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    escaped = "".join(f"\\{c}" if c in "|<>*_`[]#\\" else c for c in text)
    return " ".join(escaped.split())
