"""A run's folder: configuration, metrics, samples, log and lock, so that any run can be read, watched and
resumed.

``config.yaml``, ``machine.json``, ``metrics.jsonl`` (the truth), ``tensorboard/``, ``samples/step_000100.parquet``,
``probes/``, ``log.txt`` and, written by `CheckpointStore` on the same folder, ``step_000100/`` and ``latest``.

Metrics, samples and whatever is given to `Run.later` are written by one thread, in order, while the run goes on; what
that thread raises is raised by the next call that gives it something, by `Run.sync` or at the end.

Left out on purpose: what a step is and what a checkpoint holds, which the training loops know.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet
import yaml

from rlhf_ray import console
from rlhf_ray.profiling import span
from rlhf_ray.rundir.config_diff import config_difference
from rlhf_ray.rundir.files import replace_text
from rlhf_ray.rundir.lock import RunLock
from rlhf_ray.rundir.machine import write_machine
from rlhf_ray.rundir.metrics import FILE_NAME, metrics_line, read_metrics, trim_metrics
from rlhf_ray.rundir.signals import StopSignals
from rlhf_ray.rundir.writer import Writer
from rlhf_ray.storage import Mirror

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_ray.rundir.board import Board

__all__ = ["Run", "prepare_folder", "read_metrics"]

CONFIG = "config.yaml"
KINDS_OF_SAMPLES = ("samples", "probes")


def prepare_folder(folder: Path, mirror: Mirror | None, *, overwrite: bool) -> None:
    """Delete a run and its mirror to begin anew, or take the configuration of a run that only the mirror has."""
    if overwrite and folder.exists():
        with RunLock(folder):
            shutil.rmtree(folder)
    if mirror is None:
        return
    if overwrite:
        mirror.clear()
    elif not (folder / CONFIG).exists() and (text := mirror.read(CONFIG)) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / CONFIG, text.decode())


class Run:
    """One run and its folder, which belongs to it alone until `close`.  Made by `Run.open`."""

    def __init__(self, folder: Path, lock: RunLock, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._lock = lock
        self._metrics = (folder / FILE_NAME).open("a", encoding="utf-8")
        self._log = (folder / "log.txt").open("a", encoding="utf-8")
        self._writer = Writer()
        self._settings = settings
        self._tensorboard: Board | None = None
        self._purge_step: int | None = None
        self._seconds: dict[str, float] = {}
        self._signals: StopSignals | None = None

    @classmethod
    def open(
        cls, folder: str | Path, config: dict[str, Any], *, resume: bool, allow_config_change: bool = False
    ) -> Run:
        """Take a folder for a run, new or to be continued; a folder without a run in it can be resumed too.

        ValueError when the folder is in use, holds a run that is not resumed, or one whose configuration
        differs.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run folder {folder} can't be made: {error.strerror}; name another one") from error
        with ExitStack() as stack:
            lock = stack.enter_context(RunLock(folder))
            changes = _settle_config(folder, config, resume, allow_config_change)
            trim_metrics(folder, None)
            write_machine(folder)
            run = cls(folder, lock, config)
            stack.pop_all()  # from here on the run holds the lock
        for change in changes:
            run.say(f"configuration changed: {change}")
        return run

    def resume_at(self, step: int) -> None:
        """Forget what came after the checkpoint of ``step``: later metrics, samples and TensorBoard events.

        Step 0 (with steps counted from 1) when there is no checkpoint to resume from.  What could not be written before
        is forgotten too.
        """
        self._writer.close(quietly=True)
        self._writer, self._seconds = Writer(), {}
        if self._tensorboard:
            self._tensorboard.close()
            self._tensorboard = None
        self._metrics.close()
        trim_metrics(self.folder, step)
        self._metrics = (self.folder / FILE_NAME).open("a", encoding="utf-8")
        for kind in KINDS_OF_SAMPLES:
            for path in (self.folder / kind).glob("step_*"):
                if path.suffix != ".parquet" or int(path.stem.removeprefix("step_")) > step:
                    path.unlink()
        self._purge_step = step + 1

    def log(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Write one line of metrics.jsonl and TensorBoard scalars, with the seconds timed since the last line.

        Returns the line.
        """
        row = {**metrics, **self._seconds}
        self._seconds = {}
        self._writer.submit(self._write_metrics, step, row)
        return row

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]], *, kind: str = "samples") -> None:
        """Write samples/step_000100.parquet, or probes/: column step, then every key of any row, None where a row
        lacks it.

        The rows are read by the thread that writes them, so making them can be left to it.
        """
        assert kind in KINDS_OF_SAMPLES, kind
        self._writer.submit(self._write_samples, step, rows, kind)

    def histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Write how a step's values are spread, for TensorBoard alone."""
        self._writer.submit(self._write_board, "histograms", step, values)

    def note(self, step: int, text: str) -> None:
        """Write some words about a step, for TensorBoard alone."""
        self._writer.submit(self._write_board, "note", step, text)

    def later(self, job: Callable[..., object], *arguments: Any) -> Future[None]:
        """Carry a job out once everything logged so far would survive a power cut, as a checkpoint relies on it."""
        self._writer.submit(self._make_durable)
        return self._writer.submit(job, *arguments)

    def sync(self) -> None:
        """Wait until everything so far is written and would survive a power cut; raises what writing it raised."""
        self._writer.submit(self._make_durable)
        self._writer.wait()

    @contextmanager
    def written(self) -> Iterator[None]:
        """Have everything written at the end, however it comes; an error inside goes before one of the writing."""
        try:
            yield
        except BaseException:
            self._writer.wait(quietly=True)
            raise
        self.sync()

    def _write_metrics(self, step: int, row: Mapping[str, float]) -> None:
        with self._writing(f"the metrics of step {step}"):
            self._metrics.write(metrics_line(step, row))
            self._metrics.flush()
            self._board().scalars(step, row)

    def _write_board(self, kind: str, step: int, value: Any) -> None:
        with self._writing(f"the {kind} of step {step}"):
            getattr(self._board(), kind)(step, value)

    def _board(self) -> Board:
        """Only ever asked for by the writer's thread; slow to import, and not every run logs."""
        if self._tensorboard is None:
            from rlhf_ray.rundir.board import Board

            self._tensorboard = Board(self.folder, self._settings, self._purge_step)
        return self._tensorboard

    def _write_samples(self, step: int, rows: Iterable[Mapping[str, Any]], kind: str) -> None:
        with self._writing(f"the {kind} of step {step}"):
            kept = list(rows)
            write_samples(self.folder / kind / f"step_{step:06d}.parquet", step, kept)
            if kind == "samples":
                self._board().answers(step, kept)

    def _make_durable(self) -> None:
        with self._writing("the metrics"):
            os.fsync(self._metrics.fileno())

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Errors of the disk as the ValueError that they are for whoever owns it."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{self.folder}: {what} could not be written: {error.strerror or error}; the checkpoints are intact: "
                "free some space or mend the disk, and the same command goes on"
            ) from error

    def say(self, text: str) -> None:
        """Print a line and add it to log.txt with the time."""
        console.say(text)
        with self._writing("log.txt"):
            self._log.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")
            self._log.flush()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to ``time/<phase>`` of the next `log`."""
        start = time.perf_counter()
        try:
            with span(phase):
                yield
        finally:
            name = f"time/{phase}"
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def install_signal_handlers(self) -> None:
        """Let Ctrl-C and SIGTERM set `should_stop`; in the main thread only."""
        self._signals = self._signals or StopSignals()

    @property
    def should_stop(self) -> bool:
        """Whether the run was asked to finish its step, save and stop."""
        return self._signals is not None and self._signals.should_stop

    def close(self, *, quietly: bool = False) -> None:
        """Write and close everything and give the folder free; a second call does nothing.

        Raises what the writing raised, unless ``quietly``.
        """
        try:
            self._writer.close(quietly=quietly)
        finally:
            if self._signals:
                self._signals.restore()
            board = [self._tensorboard.close] if self._tensorboard else []
            for close in (*board, self._metrics.close, self._log.close):
                with suppress(OSError):  # of a full disk, which whoever wrote has told of
                    close()
            self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(quietly=error is not None)


def write_samples(path: Path, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows and their step as a Parquet file; a row lacks nothing but has None."""
    rows = list(rows)
    assert rows, "no samples to write"
    names = ["step", *dict.fromkeys(name for row in rows for name in row if name != "step")]
    columns = {name: [step if name == "step" else row.get(name) for row in rows] for name in names}
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _settle_config(folder: Path, config: dict[str, Any], resume: bool, allow_change: bool) -> list[str]:
    """Write config.yaml, or compare with the one there; returns the lines of an allowed difference."""
    path = folder / CONFIG
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    changes: list[str] = []
    if not resume and any((folder / name).exists() for name in (CONFIG, FILE_NAME, "latest")):
        raise ValueError(f"{folder} already holds a run; resume it (--resume) or name another folder")
    if path.exists():
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
        changes = config_difference(old if isinstance(old, dict) else {}, yaml.safe_load(text))
        if changes and not allow_change:
            raise ValueError(
                f"{path} is not the configuration given; its fields -> the fields given:\n  "
                + "\n  ".join(changes)
                + "\ngive the same configuration, name another folder, or pass --allow-config-change"
            )
    if changes or not path.exists():
        replace_text(path, text)
    return changes
