"""The manifest of a checkpoint folder: what was written, so that a partial or altered one is refused by name.

``manifest.json`` holds the format version, the step, the score and its metric, and size and SHA-256 of every
other file. Its own bytes are fixed by its contents and end in a digest of them, so no bit of the folder is
left unchecked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.rundir.files import CheckpointError, read_json, sync_folder, write_text_durably

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint's manifest says of it."""

    step: int
    """Optimisation step after which it was written."""
    score: float | None
    """Value by which checkpoints are compared; None when there is none or it is not finite."""
    metric: str
    """Name of the score."""
    files: dict[str, tuple[int, str]]
    """Path relative to the folder -> (size in bytes, SHA-256 in hex)."""


def seal(folder: Path, *, step: int, score: float | None, metric: str) -> None:
    """Sync every file of a finished folder, write its manifest, and sync the folder and those in it."""
    files = {name: _size_and_digest(folder / name, sync=True) for name in _names(folder)}
    score = score if score is not None and math.isfinite(score) else None
    manifest = Manifest(step=step, score=score, metric=metric, files=files)
    write_text_durably(folder / MANIFEST, _render(manifest))
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest alone, not the files it names; CheckpointError names file and fault."""
    path = folder / MANIFEST
    body = read_json(path)
    version = body.get("format_version") if isinstance(body, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r} is unknown; "
            f"this program reads {FORMAT_VERSION}: use the one that wrote it"
        )
    try:
        manifest = Manifest(
            step=int(body["step"]),
            score=None if body["score"] is None else float(body["score"]),
            metric=str(body["metric"]),
            files={str(name): (int(size), str(digest)) for name, (size, digest) in body["files"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: altered: {error!r}") from error
    if path.read_bytes() != _render(manifest).encode():
        raise CheckpointError(f"{path}: altered: its contents don't match its own SHA-256")
    return manifest


def verify(folder: str | Path) -> Manifest:
    """Check that a checkpoint is whole and unaltered, reading all of it.

    CheckpointError names the file and the fault: missing, extra, truncated, altered, unknown version, bad
    JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a checkpoint folder")
    manifest = read_manifest(folder)
    found = set(_names(folder))
    if missing := sorted(set(manifest.files) - found):
        raise CheckpointError(f"{folder / missing[0]}: missing")
    if extra := sorted(found - set(manifest.files)):
        raise CheckpointError(f"{folder / extra[0]}: extra: the manifest does not name it")
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        found_size = path.stat().st_size
        if found_size != size:
            fault = "truncated" if found_size < size else "grown"
            raise CheckpointError(f"{path}: {fault}: {found_size} bytes, {size} were written")
        try:
            found_digest = _size_and_digest(path)[1]
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        if found_digest != digest:
            raise CheckpointError(f"{path}: altered: its SHA-256 is not the one that was written")
    return manifest


def _names(folder: Path) -> list[str]:
    names = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path}: is not a plain file or folder")
        if path.is_file() and path != folder / MANIFEST:
            names.append(path.relative_to(folder).as_posix())
    return names


def _size_and_digest(path: Path, *, sync: bool = False) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, digest


def _render(manifest: Manifest) -> str:
    body: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "step": manifest.step,
        "score": manifest.score,
        "metric": manifest.metric,
        "files": {name: list(entry) for name, entry in sorted(manifest.files.items())},
    }
    body["sha256"] = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps(body, indent=1) + "\n"
