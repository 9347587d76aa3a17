"""Atomic, verified checkpoints of a run: ``step_000100/`` folders, kept by count and by score.

A checkpoint is written beside under a temporary name, every file synced, sealed by a manifest, and renamed;
then ``latest`` names it. So a folder called ``step_...`` is complete, unless something altered it later,
which `verify` tells by name. Everything that the store knows is read from those folders: a resumed run has
the same best checkpoint as the run it resumes.

A store belongs to one process at a time (`RunLock` sees to that); reading ones may look on. Left out on
purpose: what is in a checkpoint, which the caller writes with `save_tree` or as model folders.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pyarrow import ArrowException
from safetensors import SafetensorError

from rlhf_ray.rundir.files import CheckpointError, replace_text, sync_folder
from rlhf_ray.rundir.manifest import Manifest, read_manifest, seal, verify
from rlhf_ray.rundir.metrics import FILE_NAME, read_metrics
from rlhf_ray.rundir.tree import load_tree, save_tree
from rlhf_ray.storage import Mirror
from rlhf_ray.uploads import Uploads

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "load_tree",
    "save_tree",
    "step_name",
    "verify",
]

_STEP = re.compile(r"step_(\d{6,})")
_LEFTOVER = re.compile(r"\.(tmp|old)-(.+)-(\d+)")
_log = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """``step_000100`` for step 100."""
    return f"step_{step:06d}"


class CheckpointStore:
    """The checkpoints of one run.

    ``keep`` newest ones, ``keep_best`` best ones by score and those of every ``keep_every``-th step (0: of none) are
    kept, the rest deleted; ``metric`` names the score and ``mode`` says which is better; checkpoints scored by another
    metric don't compete. ``report`` gets one line for every checkpoint that is refused. ``mirror`` gets a copy of each
    behind the caller's back, one upload at a time, until `close`, and gives it back where the local folder lacks it.
    ValueError on a ``keep`` below 1.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        keep: int,
        keep_every: int = 0,
        keep_best: int = 1,
        metric: str = "score",
        mode: Literal["max", "min"] = "max",
        mirror: Mirror | None = None,
        report: Callable[[str], object] = _log.warning,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; keep at least 1 checkpoint")
        for name, number in (("keep_every", keep_every), ("keep_best", keep_best)):
            if number < 0:
                raise ValueError(f"{name} is {number}; give 0 or more")
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}; allowed are 'max' and 'min'")
        self.root = Path(root)
        self.keep, self.keep_every, self.keep_best, self.metric = keep, keep_every, keep_best, metric
        self._sign = 1.0 if mode == "max" else -1.0
        self._mirror = mirror
        self._report = report
        self._uploads = Uploads(mirror, self.root, report) if mirror else None

    verify = staticmethod(verify)

    def write(self, step: int, fill: Callable[[Path], object], *, score: float | None = None) -> Path:
        """Write the checkpoint of ``step``: ``fill`` puts its files into the empty folder that it is given.

        Checkpoints of later steps belong to a course that the run has left, and are deleted. CheckpointError,
        and nothing half-written, when the disk does not take it; whatever ``fill`` raises otherwise passes
        through, with nothing written either.
        """
        assert step >= 0, f"step is {step}"
        self.root.mkdir(parents=True, exist_ok=True)
        self._recover()
        final = self.root / step_name(step)
        temporary = self._temporary(final.name)
        try:
            temporary.mkdir()
            fill(temporary)
            seal(temporary, step=step, score=score, metric=self.metric)
            self.wait()  # perhaps for what is deleted next
            for later in [folder for s, folder in self._folders() if s > step]:
                self._remove(later)
            self._publish(temporary, final)
            replace_text(self.root / "latest", f"{final.name}\n")
            self._prune()
        except (OSError, SafetensorError, ArrowException) as error:
            raise CheckpointError(
                f"{final}: could not be written: {error}; the checkpoints before it are intact. "
                "Free some space or mend the store, then resume"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # renamed when all went well
        if self._uploads:
            self._uploads.begin(self._readable(), keeps=self._mirror_keeps)
        return final

    def forget(self, *, after: int) -> None:
        """Delete the checkpoints of later steps than ``after``, here and in the mirror."""
        self.wait()
        for folder in [folder for step, folder in self._folders() if step > after]:
            self._remove(folder)
        for name in self._mirror.names() if self._mirror else []:
            if self._mirror and _STEP.fullmatch(name) and _step_of(name) > after:
                self._mirror.remove(name)

    def wait(self) -> None:
        """Wait until nothing is on its way to the mirror."""
        if self._uploads:
            self._uploads.wait()

    def close(self) -> None:
        """Bring the mirror up to date, if there is one; CheckpointError when it can't be."""
        if self._uploads:
            self._uploads.finish(self._readable(), keeps=self._mirror_keeps)

    def latest(self) -> Path | None:
        """The checkpoint that ``latest`` names (without it, the last by name), not verified; None before the first."""
        pointer = self.root / "latest"
        if pointer.is_file():
            name = pointer.read_text(encoding="utf-8").strip()
            if _STEP.fullmatch(name) and (self.root / name).is_dir():
                return self.root / name
        folders = self._folders()
        return folders[-1][1] if folders else None

    def best(self) -> Path | None:
        """The checkpoint with the best score of this store's metric; None when none has a score."""
        ranked = self._ranked()
        return ranked[0] if ranked else None

    def newest_complete(self) -> Path | None:
        """The newest checkpoint that verifies, reporting each newer one that does not; None when there is none.

        For the run that is about to resume: what a killed run left half-replaced is put back first, and what
        only the mirror has is downloaded, with the best checkpoint and the metrics that go with it.
        """
        self._recover()
        local = {folder.name for _, folder in self._folders()}
        remote = {name for name in self._mirror.names() if _STEP.fullmatch(name)} if self._mirror else set()
        for name in sorted(local | remote, key=_step_of, reverse=True):
            if name in local and self._refusal(self.root / name) is None:
                return self.root / name
            if name in remote and self._pull(name):
                self._pull_bookkeeping(_step_of(name), remote - local)
                return self.root / name
        return None

    def _refusal(self, folder: Path) -> str | None:
        try:
            verify(folder)
        except CheckpointError as error:
            self._report(f"checkpoint refused: {error}")
            return str(error)
        return None

    def _pull(self, name: str) -> bool:
        assert self._mirror is not None
        self.root.mkdir(parents=True, exist_ok=True)
        temporary = self._temporary(name)
        temporary.mkdir()
        try:
            self._mirror.pull(name, temporary)
            if self._refusal(temporary) is not None:
                return False
            self._publish(temporary, self.root / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return True

    def _pull_bookkeeping(self, step: int, missing: set[str]) -> None:
        assert self._mirror is not None
        best = (self._mirror.read("best") or b"").decode().strip()
        if best in missing and _step_of(best) < step:
            self._pull(best)
        metrics = self._mirror.read(FILE_NAME)
        if metrics is not None and max((row["step"] for row in read_metrics(self.root)), default=0) < step:
            replace_text(self.root / FILE_NAME, metrics.decode())

    def _publish(self, temporary: Path, final: Path) -> None:
        """Give a sealed folder its name; the one that has it waits aside, for `_recover` if we die here."""
        aside = self.root / f".old-{final.name}-{os.getpid()}"
        if final.exists():
            final.rename(aside)
        temporary.rename(final)
        sync_folder(self.root)
        shutil.rmtree(aside, ignore_errors=True)

    def _prune(self) -> None:
        ranked = self._ranked()
        if ranked:
            replace_text(self.root / "best", f"{ranked[0].name}\n")
        for folder in self._readable()[: -self.keep]:
            if folder not in ranked[: self.keep_best] and not self._for_ever(_step_of(folder.name)):
                self._remove(folder)

    def _readable(self) -> list[Path]:
        """Checkpoints in the order of steps; an unreadable one is nobody's rival, and evidence."""
        return [folder for _, folder in self._folders() if _manifest(folder)]

    def _for_ever(self, step: int) -> bool:
        return self.keep_every > 0 and step % self.keep_every == 0

    def _mirror_keeps(self, name: str) -> bool:
        """Whether the mirror goes on holding a folder that is not here: a foreign one, or one kept for ever."""
        newest = self._folders()
        if not _STEP.fullmatch(name) or not newest:
            return True
        return self._for_ever(_step_of(name)) and _step_of(name) <= newest[-1][0]

    def _ranked(self) -> list[Path]:
        """Folders scored by this store's metric, best first, the newer first among equals."""
        scored = []
        for step, folder in self._folders():
            manifest = _manifest(folder)
            if manifest and manifest.metric == self.metric and manifest.score is not None:
                scored.append((self._sign * manifest.score, step, folder))
        return [folder for _, _, folder in sorted(scored, reverse=True)]

    def _folders(self) -> list[tuple[int, Path]]:
        """(step, folder) in the order of steps."""
        if not self.root.is_dir():
            return []
        found = [(_step_of(path.name), path) for path in self.root.iterdir() if _STEP.fullmatch(path.name)]
        return sorted((step, path) for step, path in found if path.is_dir())

    def _temporary(self, name: str) -> Path:
        return self.root / f".tmp-{name}-{os.getpid()}"

    def _remove(self, folder: Path) -> None:
        """Delete a checkpoint, its name first: a kill never leaves part of one under that name."""
        doomed = self._temporary(folder.name)
        folder.rename(doomed)
        shutil.rmtree(doomed)

    def _recover(self) -> None:
        """Clear up after killed runs: put back a checkpoint whose replacement never came, delete the rest."""
        for path in list(self.root.iterdir()) if self.root.is_dir() else []:
            match = _LEFTOVER.fullmatch(path.name)
            if not match or _is_running(int(match[3])):
                continue
            if match[1] == "old" and not (self.root / match[2]).exists():
                path.rename(self.root / match[2])
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _step_of(name: str) -> int:
    match = _STEP.fullmatch(name)
    assert match, name
    return int(match[1])


def _manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except CheckpointError:
        return None


def _is_running(pid: int) -> bool:
    """Whether another process has this id: what it is writing is not ours to clear up."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
