"""Tokenised rows on disk, so that the second start of a stage reads what the first one made.

An entry (``rundir/entries.py``) is named by a digest of all that its rows follow from, and holds ``rows.arrow``, which
is mapped and not read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import pyarrow as pa

from rlhf_ray.data.row_table import to_table
from rlhf_ray.rundir.entries import Entries, megabytes

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
        self.folder = folder
        self.notes: list[str] = []
        """What happened, in lines for people."""
        self._entries = Entries(folder, keep=keep, note=self.notes.append, again="its rows are tokenised again")

    def table(self, name: str, make: Make) -> tuple[pa.Table, dict[str, Any]]:
        """The rows of an entry as a mapped table, and its facts; made, and kept, where there is no whole one.

        Whatever ``make`` raises passes through; ValueError when the disk does not take the entry.
        """
        path = self._entries.find(name)
        if path is None:
            try:
                return _read(self._entries.make(name, lambda folder: self._write(folder, make)))
            except OSError as error:
                raise ValueError(
                    f"cache = {self.folder}: can't be written: {error.strerror or error}; free space, name another "
                    "folder, or pass --cache null"
                ) from error
        table, facts = _read(path)
        seconds = facts["seconds"]
        self.notes.append(f"rows read from {path} ({megabytes(path)}) instead of {seconds:.1f} s of tokenising")
        return table, facts

    def _write(self, folder: Path, make: Make) -> None:
        """Make the rows of an entry, and put them into its folder."""
        started = perf_counter()
        rows, facts = make()
        facts = {**facts, "seconds": perf_counter() - started}
        table = to_table(rows).replace_schema_metadata({FACTS: json.dumps(facts)})
        with pa.OSFile(str(folder / ROWS), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        self.notes.append(f"rows tokenised in {facts['seconds']:.1f} s and kept in {self.folder} ({megabytes(folder)})")


def _read(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """An entry's rows and facts."""
    with pa.memory_map(str(path / ROWS)) as file:
        table = pa.ipc.open_file(file).read_all()
    return table, json.loads(table.schema.metadata[FACTS])
