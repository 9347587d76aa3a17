"""Read a data file of any known format into rows.

``read_text``, ``read_chats``, ``read_pairs`` and ``read_prompts`` take a path and return a list.  A bad row
is logged as ``file:line: reason`` and skipped, up to max_bad_rows; one more is a ValueError.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_ray.data.formats import CHATS, PAIRS, PROMPTS, TEXTS, Table, parse
from rlhf_ray.data.records import Bad, Numbered, is_text, lines, parse_json, records
from rlhf_ray.data.rows import ChatRow, PairRow, PromptRow, TextRow

log = logging.getLogger(__name__)


def read_text(path: Path | str, max_bad_rows: int = 0) -> list[TextRow]:
    """Read documents: {text} records, or plain text in which a blank line ends a document.

    Raises ValueError as ``file:line: reason`` on more than max_bad_rows bad rows, and when no row is left.
    """
    return _collect(Path(path), "text", max_bad_rows)


def read_chats(path: Path | str, max_bad_rows: int = 0) -> list[ChatRow]:
    """Read conversations: {messages}, {conversations}, {prompt, response} or {instruction, input, output}.

    Raises ValueError as ``file:line: reason`` on more than max_bad_rows bad rows, and when no row is left.
    """
    return _collect(Path(path), "chats", max_bad_rows)


def read_pairs(path: Path | str, max_bad_rows: int = 0) -> list[PairRow]:
    """Read preferences: {chosen, rejected} with {prompt} or {instruction, input}, or that repeat the prompt.

    Raises ValueError as ``file:line: reason`` on more than max_bad_rows bad rows, and when no row is left.
    """
    return _collect(Path(path), "pairs", max_bad_rows)


def read_prompts(path: Path | str, max_bad_rows: int = 0) -> list[PromptRow]:
    """Read prompts: {prompt}, {messages}, {instruction, input}, or plain text with one prompt on each line.

    A line of plain text that begins with a brace is a JSON record.
    Raises ValueError as ``file:line: reason`` on more than max_bad_rows bad rows, and when no row is left.
    """
    return _collect(Path(path), "prompts", max_bad_rows)


TABLES: dict[str, Table[Any]] = {"pairs": PAIRS, "chats": CHATS, "text": TEXTS, "prompts": PROMPTS}
"""The kinds of rows, those with more to them first."""


def numbered_rows(path: Path, kind: str) -> Iterator[Numbered]:
    """Yield (number, row or Bad) of a file that is read as ``kind``, one at a time.

    Raises ValueError when the file can't be read.
    """
    numbered: Iterator[Numbered]
    to_row: Callable[[Any], Any]
    if is_text(path) and kind == "text":
        numbered, to_row = _paragraphs(lines(path)), lambda text: TextRow(text=text)
    elif is_text(path) and kind == "prompts":
        numbered, to_row = (item for item in lines(path) if item[1] != ""), _prompt_line
    else:
        numbered, to_row = records(path), partial(parse, table=TABLES[kind])
    for number, record in numbered:
        try:
            row = record if isinstance(record, Bad) else to_row(record)
        except ValueError as error:
            row = Bad(str(error))
        yield number, row


def _prompt_line(line: str) -> PromptRow:
    if line.lstrip().startswith("{"):
        return parse(parse_json(line), PROMPTS)
    return parse({"prompt": line}, PROMPTS)


def _paragraphs(numbered: Iterator[Numbered]) -> Iterator[Numbered]:
    """Join the lines between blank lines; a paragraph bears the number of its first line."""
    first, held = 0, list[str]()
    for number, line in numbered:
        if isinstance(line, Bad):
            yield number, line
        elif line:
            first = first if held else number
            held.append(line)
        elif held:
            yield first, "\n".join(held)
            held.clear()
    if held:
        yield first, "\n".join(held)


def _collect(path: Path, kind: str, max_bad_rows: int) -> list[Any]:
    """Every row, counting what can't be parsed."""
    if max_bad_rows < 0:
        raise ValueError(f"max_bad_rows is {max_bad_rows}, expected 0 or more")
    rows, bad = list[Any](), 0
    for number, row in numbered_rows(path, kind):
        if not isinstance(row, Bad):
            rows.append(row)
            continue
        bad += 1
        reason = f"{path}:{number}: {row.reason}"
        if bad > max_bad_rows:
            raise ValueError(f"{reason} ({bad} bad rows, max_bad_rows is {max_bad_rows})")
        log.warning("%s (skipped, bad row %d of at most %d)", reason, bad, max_bad_rows)
    if not rows:
        raise ValueError(f"{path}: no rows" + (f", {bad} bad ones skipped" if bad else ": the file is empty"))
    return rows
