"""An objective's dataset, kept on disk between starts.

The name of an entry is a digest of the data files' contents, the vocabulary, the options that decide what the rows
are, and the code that makes them; so an entry is never out of date, and a change of anything else finds it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import rlhf_ray.data
import rlhf_ray.objectives
import rlhf_ray.tokenizer
from rlhf_ray.config import repository_path
from rlhf_ray.data.cache import RowCache, entry_name
from rlhf_ray.data.row_table import TableRows
from rlhf_ray.objectives.base import Dataset, Objective


def cached_dataset(objective: Objective, folder: Path | None) -> Dataset:
    """What ``objective.dataset()`` returns, from the cache in ``folder`` where it holds it; None: no cache."""
    if folder is None:
        return objective.dataset()

    def make() -> tuple[Sequence[Any], dict[str, Any]]:
        made = objective.dataset()
        return [*made.train, *made.held_out], {"train": len(made.train), "counts": dict(made.counts)}

    store = RowCache(repository_path(folder))
    table, facts = store.table(entry_name(recipe(objective)), make)
    train, everything = facts["train"], table.num_rows
    return Dataset(
        train=TableRows(objective.row_kind, table, range(train)),
        held_out=TableRows(objective.row_kind, table, range(train, everything)),
        counts=facts["counts"],
        notes=tuple(store.notes),
    )


def recipe(objective: Objective) -> dict[str, Any]:
    """All that an objective's rows follow from, as JSON values."""
    config = objective.config
    return {
        "objective": type(objective).__name__,
        "files": [[path.name, _file_digest(path)] for path in map(repository_path, config.data)],
        "vocabulary": objective.tokenizer.fingerprint,
        "options": {name: getattr(config, name) for name in objective.row_options},
        "code": _code_digest(),
    }


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _code_digest() -> str:
    """Digest of the sources that read, tokenise and pack rows."""
    total = hashlib.sha256()
    for package in (rlhf_ray.data, rlhf_ray.objectives, rlhf_ray.tokenizer):
        for folder in package.__path__:
            for path in sorted(Path(folder).glob("*.py")):
                total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
