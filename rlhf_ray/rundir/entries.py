"""Folders that can be made again, kept for whoever needs them next: tokenised rows, weights in another form.

An entry's name is a digest of all that it follows from.  It is written beside its place, sealed with the SHA-256 of its
files and renamed, so there is never half an entry under a name, whatever is killed; one that was altered later is made
anew.  Whoever comes first makes an entry and the others wait, whether they are ranks of one run or other runs.

Left out on purpose: remote storage; an entry is only worth its disk where reading it is faster than making it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_ray.rundir.files import CheckpointError
from rlhf_ray.rundir.manifest import read_manifest, seal, verify


class Entries:
    """A folder of entries, of which the newest ``keep`` stay."""

    def __init__(self, folder: Path, *, keep: int, note: Callable[[str], object], again: str) -> None:
        """``note`` is told what happens; ``again`` says what becomes of an altered entry."""
        self.folder, self.keep, self.note, self.again = folder, keep, note, again

    def find(self, name: str, *, read_through: bool = True) -> Path | None:
        """The entry; None where there is none or its files, if they are to be ``read_through``, are altered."""
        path = self.folder / name
        if not path.is_dir():
            return None
        try:
            verify(path) if read_through else read_manifest(path)
        except CheckpointError as error:
            self.note(f"cache entry refused: {error}; {self.again}")
            return None
        return path

    def make(self, name: str, write: Callable[[Path], None]) -> Path:
        """The entry, which ``write`` puts into a folder unless somebody else has made it meanwhile; OSError where the
        disk does not take it.
        """
        path = self.folder / name
        with self._lock():
            if (made_by_another := self.find(name)) is not None:
                return made_by_another
            temporary = path.with_name(f".tmp-{name}")
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed: the lock is ours
            temporary.mkdir()
            try:
                write(temporary)
                seal(temporary, step=0, score=None, metric="")
                shutil.rmtree(path, ignore_errors=True)
                temporary.rename(path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            self._prune()
            return path

    def _prune(self) -> None:
        """Delete the oldest entries beyond ``keep``; whoever has one mapped keeps its memory."""
        entries = [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        entries.sort(key=lambda path: path.stat().st_mtime_ns)
        for path in entries[: -self.keep]:
            self.note(f"cache: deleting {path} ({megabytes(path)}), the newest {self.keep} entries are kept")
            shutil.rmtree(path)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Wait until no other process makes an entry; the kernel frees the lock of one that dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def megabytes(path: Path) -> str:
    """What an entry takes of the disk, in words."""
    return f"{sum(file.stat().st_size for file in path.iterdir()) / 1e6:.1f} MB"
