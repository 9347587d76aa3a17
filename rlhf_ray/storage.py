"""A second home of a run's checkpoints, through pyarrow.fs: a mounted folder, S3 or GCS by URI.

A run always writes to its local folder first, where a rename makes a checkpoint complete at once. Object
stores have no rename, so the mirror gets the finished folder's files and then, last, ``latest``: a reader
that goes by ``latest`` never sees half a checkpoint, and one that tries the others verifies what it
downloads.
"""

from __future__ import annotations

from pathlib import Path

from pyarrow import ArrowInvalid
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, copy_files


class Mirror:
    """A folder of a pyarrow filesystem that holds copies of checkpoint folders."""

    def __init__(self, filesystem: FileSystem, base: str) -> None:
        self.filesystem = filesystem
        self.base = base.rstrip("/")

    @classmethod
    def open(cls, uri: str) -> Mirror:
        """Open ``s3://bucket/path``, ``gs://bucket/path``, ``file:///path`` or an absolute path; ValueError
        otherwise.
        """
        try:
            filesystem, base = FileSystem.from_uri(uri)
        except ArrowInvalid as error:
            raise ValueError(f"mirror is {uri!r}: {error}; give s3://, gs://, file:// or an absolute path") from error
        return cls(filesystem, base)

    def names(self) -> list[str]:
        """Names of the folders held, complete or not."""
        selector = FileSelector(self.base, allow_not_found=True)
        entries = self.filesystem.get_file_info(selector)
        return sorted(entry.base_name for entry in entries if entry.type == FileType.Directory)

    def latest(self) -> str | None:
        """Name of the folder that was pushed last, None before the first."""
        path = f"{self.base}/latest"
        if self.filesystem.get_file_info(path).type != FileType.File:
            return None
        with self.filesystem.open_input_stream(path) as file:
            return file.read().decode().strip()

    def push(self, folder: Path) -> None:
        """Upload a finished folder under its own name, in place of one already there, then name it in
        ``latest``.
        """
        self.remove(folder.name)
        target = f"{self.base}/{folder.name}"
        self.filesystem.create_dir(target, recursive=True)
        copy_files(str(folder), target, LocalFileSystem(), self.filesystem)
        with self.filesystem.open_output_stream(f"{self.base}/latest") as file:
            file.write(f"{folder.name}\n".encode())

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
