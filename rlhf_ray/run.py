"""A run's folder: configuration, metrics, samples, log and lock, so that any run can be read, watched and
resumed.

``config.yaml``, ``metrics.jsonl`` (the truth), ``tensorboard/``, ``samples/step_000100.parquet``, ``log.txt``
and, written by `CheckpointStore` on the same folder, ``step_000100/`` and ``latest``.

Left out on purpose: what a step is and what a checkpoint holds, which the training loops know.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

from rlhf_ray import console
from rlhf_ray.rundir.config_diff import config_difference
from rlhf_ray.rundir.files import replace_text
from rlhf_ray.rundir.lock import RunLock
from rlhf_ray.rundir.metrics import FILE_NAME, metrics_line, read_metrics, trim_metrics
from rlhf_ray.rundir.signals import StopSignals

__all__ = ["Run", "read_metrics"]


class Run:
    """One run and its folder, which belongs to it alone until `close`.  Made by `Run.open`."""

    def __init__(self, folder: Path, lock: RunLock) -> None:
        self.folder = folder
        self._lock = lock
        self._metrics = (folder / FILE_NAME).open("a", encoding="utf-8")
        self._log = (folder / "log.txt").open("a", encoding="utf-8")
        self._writer: Any = None
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
            run = cls(folder, lock)
            stack.pop_all()  # from here on the run holds the lock
        for change in changes:
            run.say(f"configuration changed: {change}")
        return run

    def resume_at(self, step: int) -> None:
        """Forget what came after the checkpoint of ``step``: later metrics, samples and TensorBoard events.

        Call it before the first `log`; step 0 (with steps counted from 1) when there is no checkpoint to
        resume from.
        """
        assert self._writer is None, "resume_at comes before the first log"
        self._metrics.close()
        trim_metrics(self.folder, step)
        self._metrics = (self.folder / FILE_NAME).open("a", encoding="utf-8")
        for path in (self.folder / "samples").glob("step_*"):
            if path.suffix != ".parquet" or int(path.stem.removeprefix("step_")) > step:
                path.unlink()
        self._purge_step = step + 1

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line of metrics.jsonl and TensorBoard scalars, with the seconds timed since the last
        line.
        """
        row = {**metrics, **self._seconds}
        self._seconds = {}
        self._metrics.write(metrics_line(step, row))
        self._metrics.flush()
        writer = self._tensorboard()
        for name, value in row.items():
            writer.add_scalar(name, float(value), step)
        writer.flush()

    def sync(self) -> None:
        """Make what was logged survive a power cut; for just before a checkpoint that relies on it."""
        os.fsync(self._metrics.fileno())

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write samples/step_000100.parquet: column step, then every key of any row, None where a row lacks
        it.
        """
        assert rows, "no samples to write"
        names = ["step", *dict.fromkeys(name for row in rows for name in row if name != "step")]
        columns = {name: [step if name == "step" else row.get(name) for row in rows] for name in names}
        path = self.folder / "samples" / f"step_{step:06d}.parquet"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
        temporary.replace(path)
        return path

    def say(self, text: str) -> None:
        """Print a line and add it to log.txt with the time."""
        console.say(text)
        self._log.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")
        self._log.flush()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to ``time/<phase>`` of the next `log`."""
        start = time.perf_counter()
        try:
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

    def close(self) -> None:
        """Flush and close everything and give the folder free; a second call does nothing."""
        if self._signals:
            self._signals.restore()
        if self._writer:
            self._writer.close()
        self._metrics.close()
        self._log.close()
        self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tensorboard(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not every run logs

            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._purge_step)
        return self._writer


def _settle_config(folder: Path, config: dict[str, Any], resume: bool, allow_change: bool) -> list[str]:
    """Write config.yaml, or compare with the one there; returns the lines of an allowed difference."""
    path = folder / "config.yaml"
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    changes: list[str] = []
    if not resume and any((folder / name).exists() for name in ("config.yaml", FILE_NAME, "latest")):
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
