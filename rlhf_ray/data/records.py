"""Files as numbered raw records, before anyone asks what they mean.

JSON lines, a JSON list, Parquet and plain text, each but Parquet also gzipped.  A record that can't be
decoded is yielded as the reason why, so that the caller counts it like any other bad row; a file that can't be
read at all is a ValueError.

Left out on purpose: remote paths, and CSV, whose quoting has no standard.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.parquet

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text", ".md")


@dataclass(frozen=True, slots=True)
class Bad:
    """Why a record could not be decoded."""

    reason: str


Numbered = tuple[int, Any]
"""Line number (row number in a JSON list or Parquet file), counted from 1, and the record or Bad."""


def _suffix(path: Path) -> str:
    """The suffix that names the format, with .gz looked through."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def is_text(path: Path) -> bool:
    """Whether the file is plain text by its name."""
    return _suffix(path) in TEXT_SUFFIXES


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def records(path: Path) -> Iterator[Numbered]:
    """Yield (number, record) of a JSON lines, JSON list or Parquet file, blank lines left out.

    Raises ValueError when the file is missing, of unknown suffix, truncated or not what its suffix says.
    """
    _check(path, (*JSON_SUFFIXES, ".parquet", *TEXT_SUFFIXES))
    if _suffix(path) == ".parquet":
        yield from _parquet_rows(path)
        return
    with _readable(path) as file:
        head = file.read(256).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        if head.startswith(b"[") and not is_text(path):
            yield from _json_list(path, file)
            return
        for number, line in _decoded(path, file):
            yield number, line if isinstance(line, Bad) else _json(line)


def lines(path: Path) -> Iterator[Numbered]:
    """Yield (number, text or Bad) of every line of a text file, blank lines as "".

    Raises ValueError when the file is missing or truncated.
    """
    _check(path, TEXT_SUFFIXES)
    with _readable(path) as file:
        yield from _decoded(path, file, keep_blank=True)


def _check(path: Path, suffixes: tuple[str, ...]) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if _suffix(path) not in suffixes:
        known = ", ".join(suffixes)
        raise ValueError(f"{path}: unknown suffix; known are {known}, all but .parquet also with .gz")


def _readable(path: Path) -> BinaryIO:
    """Open a file whose first bytes can be read, so that a wrong .gz is found before anything is yielded."""
    file = _open(path)
    try:
        file.read(1)
        file.seek(0)
    except (OSError, EOFError, zlib.error) as error:
        file.close()
        raise ValueError(f"{path}: can't be read ({error})") from error
    return file


def _decoded(path: Path, file: BinaryIO, *, keep_blank: bool = False) -> Iterator[Numbered]:
    """Lines as text; only "\\n" ends a line, for JSON strings may hold other separators."""
    number = 0
    try:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if not line.strip():
                if keep_blank:
                    yield number, ""
                continue
            try:
                yield number, line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield number, Bad(f"not UTF-8 ({error.reason} at byte {error.start})")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}:{number + 1}: can't be read on ({error})") from error


def parse_json(text: str) -> Any:
    """Parse one JSON value; ValueError with a short reason when it is malformed or nested too deep."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not usable JSON (nested too deep)") from error


def _json(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        return Bad(str(error))


def _json_list(path: Path, file: BinaryIO) -> Iterator[Numbered]:
    try:
        rows = json.loads(file.read().removeprefix(codecs.BOM_UTF8))
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise ValueError(f"{where}: not a JSON list ({error.msg} at column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise ValueError(f"{path}: not usable JSON (nested too deep)") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: can't be read ({error})") from error
    assert isinstance(rows, list)  # it began with a bracket
    yield from enumerate(rows, 1)


def _parquet_rows(path: Path) -> Iterator[Numbered]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
