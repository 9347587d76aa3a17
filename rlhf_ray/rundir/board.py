"""A run in TensorBoard: every number of metrics.jsonl, histograms, some answers, and the settings (HParams).

Events are written here and now, by whoever calls: TensorBoard's own writer does it in a thread, whose errors nobody
hears of but as a traceback.  Those of steps that a resumed run does again are struck out by a start event of its first
step, as TensorBoard's ``purge_step`` does.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import histogram, hparams, scalar, text

from rlhf_ray.rundir.config_diff import flat

SHOWN_ANSWERS = 4
BINS = 64
CLOCKS = ("time/", "perf/")
_numbers = count()


class Board:
    """The event file of one start of a run."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], purge_step: int | None) -> None:
        (folder / "tensorboard").mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._records = RecordWriter((folder / "tensorboard" / name).open("wb"))
        self._settings: dict[str, Any] | None = comparable(settings)
        self._write(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        """Write a step's numbers, and before the first ones the settings that they are compared under."""
        if self._settings:
            results = {name: 0.0 for name in row if not name.startswith(CLOCKS)}
            for part in hparams(self._settings, results):
                self._write(Event(summary=part))
            self._settings = None
        for name, value in row.items():
            self._write(Event(step=step, summary=scalar(name, float(value))))
        self._records.flush()

    def histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Write how values are spread."""
        for name, value in values.items():
            finite = value[value.isfinite()].float()
            if len(finite):
                self._write(Event(step=step, summary=histogram(name, finite.numpy(), BINS)))

    def answers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the first few rows of the samples as a table."""
        columns = list(rows[0])
        lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines[: SHOWN_ANSWERS + 2])
        self._write(Event(step=step, summary=text("samples", table)))

    def note(self, step: int, words: str) -> None:
        """Write some words."""
        self._write(Event(step=step, summary=text("notes", words)))

    def close(self) -> None:
        """Write what is left and close the file."""
        self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under dotted names, what HParams can't hold as text."""
    plain = flat(settings).items()
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in plain}


def _cell(value: object) -> str:
    """A value for a cell of a Markdown table, its text as it is."""
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    escaped = "".join(f"\\{c}" if c in "|<>*_`[]#\\" else c for c in shown)
    return " ".join(escaped.split())
