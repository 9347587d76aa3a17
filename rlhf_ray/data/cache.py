"""Tokenised rows on disk, so that the second start of a stage reads what the first one made.

An entry is a folder named by a digest of all that its rows follow from: ``rows.arrow``, which is mapped and not
read, and a manifest with its SHA-256.  It is written beside and renamed, so there is never half an entry under a
name, and one that was altered later is made again.

Whoever comes first makes an entry and the others wait, whether they are ranks of one run or other runs.

Left out on purpose: remote storage; a cache is only worth its disk where reading it is faster than tokenising.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import pyarrow as pa

from rlhf_ray.data.row_table import to_table
from rlhf_ray.rundir.files import CheckpointError
from rlhf_ray.rundir.manifest import seal, verify

ROWS = "rows.arrow"
KEEP = 8
"""Newest entries to keep."""
FACTS = b"facts"

Make = Callable[[], tuple[Sequence[Any], Mapping[str, Any]]]
"""Rows of a dataclass, and what else is to be known of them, as JSON values."""


def entry_name(recipe: Mapping[str, Any]) -> str:
    """Digest of all that rows follow from, given as JSON values."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]


class RowCache:
    """A folder of entries, of which the newest ``keep`` stay."""

    def __init__(self, folder: Path, *, keep: int = KEEP) -> None:
        self.folder, self.keep = folder, keep
        self.notes: list[str] = []
        """What happened, in lines for people."""

    def table(self, name: str, make: Make) -> tuple[pa.Table, dict[str, Any]]:
        """The rows of an entry as a mapped table, and its facts; made, and kept, where there is no whole one.

        Whatever ``make`` raises passes through; ValueError when the disk does not take the entry.
        """
        path = self.folder / name
        found = self._read(path)
        if found is None:
            try:
                found = self._make(path, make)
            except OSError as error:
                raise ValueError(
                    f"cache = {self.folder}: can't be written: {error.strerror or error}; free space, name another "
                    "folder, or pass --cache null"
                ) from error
        else:
            seconds = found[1]["seconds"]
            self.notes.append(f"rows read from {path} ({_megabytes(path)}) instead of {seconds:.1f} s of tokenising")
        return found

    def _make(self, path: Path, make: Make) -> tuple[pa.Table, dict[str, Any]]:
        with self._lock():
            made_by_another = self._read(path)
            if made_by_another is not None:
                return made_by_another
            started = perf_counter()
            rows, facts = make()
            facts = {**facts, "seconds": perf_counter() - started}
            self._write(path, to_table(rows).replace_schema_metadata({FACTS: json.dumps(facts)}))
            self.notes.append(f"rows tokenised in {facts['seconds']:.1f} s and kept in {path} ({_megabytes(path)})")
            self._prune()
            made = self._read(path)
            assert made is not None, f"{path} was verified while the folder was locked"
            return made

    def _read(self, path: Path) -> tuple[pa.Table, dict[str, Any]] | None:
        """The entry, None when there is none or it was altered."""
        if not path.is_dir():
            return None
        try:
            verify(path)
        except CheckpointError as error:
            self.notes.append(f"cache entry refused: {error}; its rows are tokenised again")
            return None
        with pa.memory_map(str(path / ROWS)) as file:
            table = pa.ipc.open_file(file).read_all()
        return table, json.loads(table.schema.metadata[FACTS])

    def _write(self, path: Path, table: pa.Table) -> None:
        temporary = path.with_name(f".tmp-{path.name}")
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed: the lock is ours
        temporary.mkdir()
        with pa.OSFile(str(temporary / ROWS), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        seal(temporary, step=0, score=None, metric="")
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)

    def _prune(self) -> None:
        """Delete the oldest entries beyond ``keep``; whoever has one mapped keeps its memory."""
        entries = [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        entries.sort(key=lambda path: path.stat().st_mtime_ns)
        for path in entries[: -self.keep]:
            self.notes.append(f"cache: deleting {path} ({_megabytes(path)}), the newest {self.keep} entries are kept")
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


def _megabytes(path: Path) -> str:
    return f"{(path / ROWS).stat().st_size / 1e6:.1f} MB"
