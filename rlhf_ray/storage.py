"""A second home of a run's checkpoints, through pyarrow.fs: S3 or GCS by URI, or a mounted folder.

A run always writes to its local folder first, where a rename makes a checkpoint complete at once. Object stores have
no rename, so a folder's manifest is uploaded last, and ``latest`` after it: a reader never takes half a checkpoint for
a whole one, and verifies what it downloads.

Left out on purpose: credentials, which the environment holds (``AWS_*``, ``GOOGLE_APPLICATION_CREDENTIALS``), and a
lock: two machines must not mirror runs of one name to one place.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pyarrow import ArrowException
from pyarrow.fs import (
    AwsStandardS3RetryStrategy,
    FileSelector,
    FileSystem,
    FileType,
    GcsFileSystem,
    LocalFileSystem,
    S3FileSystem,
    copy_files,
)

from rlhf_ray.config.run_fields import RunFields
from rlhf_ray.config.secrets import redacted
from rlhf_ray.rundir.manifest import MANIFEST

CONNECT_SECONDS, REQUEST_SECONDS, ATTEMPTS = 5.0, 30.0, 3
_OPTIONS = {"s3": {"region", "endpoint_override", "scheme"}, "gs": {"endpoint_override", "scheme"}}


def mirror_of(config: RunFields, stage: str) -> Mirror | None:
    """The mirror that a run's configuration asks for, opened; None when it asks for none."""
    return Mirror.open(config.mirror, stage, config.run) if config.mirror else None


class Mirror:
    """A folder of a pyarrow filesystem that holds copies of a run's checkpoints."""

    def __init__(self, filesystem: FileSystem, base: str, *, name: str = "") -> None:
        """``name`` is what messages call it."""
        self.filesystem = filesystem
        self.base = base.rstrip("/")
        self.name = name or self.base

    @classmethod
    def open(cls, uri: str, *below: str) -> Mirror:
        """Open the folder ``below`` what ``uri`` means: ``s3://bucket/path``, ``gs://bucket/path``, ``file:///path``
        or an absolute path, with Arrow's options ``?region=``, ``&endpoint_override=`` and ``&scheme=``.

        It is written to at once: ValueError, in seconds, when it is no such place, can't be reached or written, or
        when the URI holds credentials.
        """
        filesystem, base = _parse(uri)
        parts = (base.rstrip("/"), *below)
        mirror = cls(filesystem, "/".join(parts), name="/".join([redacted(uri).partition("?")[0].rstrip("/"), *below]))
        try:
            filesystem.create_dir(mirror.base, recursive=True)
            mirror.write(".probe", b"")
            filesystem.delete_file(f"{mirror.base}/.probe")
        except (OSError, ArrowException) as error:
            raise ValueError(
                f"mirror {mirror.name} can't be written: {error}; check the address, that the bucket exists, and the "
                "credentials in the environment"
            ) from error
        return mirror

    def names(self) -> list[str]:
        """Names of the folders held, complete or not."""
        selector = FileSelector(self.base, allow_not_found=True)
        entries = self.filesystem.get_file_info(selector)
        return sorted(entry.base_name for entry in entries if entry.type == FileType.Directory)

    def read(self, name: str) -> bytes | None:
        """A small file's content; None when it is not there."""
        path = f"{self.base}/{name}"
        if self.filesystem.get_file_info(path).type != FileType.File:
            return None
        with self.filesystem.open_input_stream(path) as file:
            content: bytes = file.read()
            return content

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, in place of one already there."""
        with self.filesystem.open_output_stream(f"{self.base}/{name}") as file:
            file.write(content)

    def push(self, folder: Path) -> None:
        """Upload a sealed checkpoint under its own name, unless the very same one is there already."""
        manifest = (folder / MANIFEST).read_bytes()
        if self.read(f"{folder.name}/{MANIFEST}") == manifest:
            return
        self.remove(folder.name)
        target = f"{self.base}/{folder.name}"
        self.filesystem.create_dir(target, recursive=True)
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_dir():
                self.filesystem.create_dir(f"{target}/{name}")
            elif name != MANIFEST:
                copy_files(str(path), f"{target}/{name}", LocalFileSystem(), self.filesystem)
        self.write(f"{folder.name}/{MANIFEST}", manifest)

    def pull(self, name: str, folder: Path) -> None:
        """Download the folder ``name`` as ``folder``, which must exist and be empty; OSError when it is not
        there.
        """
        copy_files(f"{self.base}/{name}", str(folder), self.filesystem, LocalFileSystem())

    def remove(self, name: str) -> None:
        """Delete the folder ``name`` if it is there."""
        path = f"{self.base}/{name}"
        if self.filesystem.get_file_info(path).type == FileType.Directory:
            self.filesystem.delete_dir(path)

    def clear(self) -> None:
        """Delete everything held."""
        self.filesystem.delete_dir_contents(self.base, missing_dir_ok=True)


def _parse(uri: str) -> tuple[FileSystem, str]:
    """The filesystem and the path in it; no part of an error repeats a credential."""
    if uri.startswith("/"):
        return LocalFileSystem(), uri
    parts = urlsplit(uri)
    scheme = "gs" if parts.scheme == "gcs" else parts.scheme
    if scheme == "file" and not parts.netloc:
        return LocalFileSystem(), unquote(parts.path)
    if scheme not in _OPTIONS:
        shown = f"{scheme}://..." if "@" in uri else uri
        raise ValueError(f"mirror is {shown!r}; give s3://, gs://, file:/// or an absolute path")
    options: dict[str, Any] = dict(parse_qsl(parts.query))
    faults = ["holds a user or a key"] if "@" in uri.partition("?")[0] else []
    faults += [f"has the unknown option {name}" for name in sorted(options.keys() - _OPTIONS[scheme])]
    if faults:
        raise ValueError(
            f"mirror {scheme}://... {faults[0]}; allowed options are {', '.join(sorted(_OPTIONS[scheme]))}; "
            "credentials are the environment's (AWS_ACCESS_KEY_ID and its secret; GOOGLE_APPLICATION_CREDENTIALS)"
        )
    return _remote(scheme, options), parts.netloc + parts.path


def _remote(scheme: str, options: dict[str, Any]) -> FileSystem:
    """S3 or GCS, each failing in less than two minutes when nobody answers."""
    if scheme == "gs":
        return GcsFileSystem(retry_time_limit=timedelta(seconds=REQUEST_SECONDS), **options)
    return S3FileSystem(
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        **options,
    )
