"""Durable small files and strict JSON, as every part of a run's folder needs them.

A file written here is either wholly the old one or wholly the new one, whatever kills the process or the
machine. Left out on purpose: Windows, where a folder can't be synced.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint, or a file of one, is missing, altered, of an unknown version or could not be written."""


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (its files' contents are synced on their own)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_durably(path: Path, text: str) -> None:
    """Write a UTF-8 file in place and sync it; the caller makes its name durable.  OSError names the file."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)  # which those of a full disk lack
        raise


def replace_text(path: Path, text: str) -> None:
    """Replace a UTF-8 file atomically and durably: a reader sees the old text or the new one."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        write_text_durably(temporary, text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def parse_json(text: str | bytes) -> Any:
    """Parse strict JSON: ValueError for a duplicate key, NaN or Infinity, which Python's own parser lets
    pass.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)


def read_json(path: Path) -> Any:
    """Parse a strict JSON file; CheckpointError names the file and the fault."""
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # bad UTF-8 too
        raise CheckpointError(f"{path}: bad JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
