"""What a person sees while a program runs: a live bar and tables on a terminal, plain lines in a file or a
pipe.

What is shown how is settled once a process, by `show`.  Left out on purpose: colours, spinners and logging levels; the
run's log.txt and metrics.jsonl keep what matters.
"""

from __future__ import annotations

import itertools
import json
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

_console = Console(highlight=False)
_mode = "live"

WIDEST_COLUMN = 50
"""Characters of a column of a plain table; longer cells are folded."""


def show(mode: str) -> None:
    """Settle what a terminal gets: a ``live`` view, ``lines``, or ``json`` alone on standard output."""
    global _console, _mode
    _mode = mode
    _console = Console(highlight=False, stderr=mode == "json")


def as_json() -> bool:
    """Whether standard output is for JSON alone."""
    return _mode == "json"


def live_terminal() -> Console | None:
    """The terminal that a live view may be drawn on, if there is one."""
    return _console if _console.is_terminal and _mode == "live" else None


def say(text: str) -> None:
    """Print one line, above the live bar when there is one."""
    if _console.is_terminal:
        _console.print(text, markup=False, soft_wrap=True)
    else:
        print(text, flush=True, file=_console.file)


def error(text: str) -> None:
    """Print one line on standard error."""
    print("error: " + " ".join(text.split("\n")), file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; numbers are aligned to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    right = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))]
    if _console.is_terminal:
        rich_table = Table(title=Text(title), title_justify="left")
        for column, numeric in zip(columns, right, strict=True):
            rich_table.add_column(Text(column), justify="right" if numeric else "left")
        for row in cells:
            rich_table.add_row(*map(Text, row))  # Text: brackets are brackets, not markup
        _console.print(rich_table)
        return
    lines = [list(columns), *cells]
    widths = [min(WIDEST_COLUMN, max(len(row[i]) for row in lines)) for i in range(len(columns))]
    print(title, file=_console.file)
    for row in [list(columns), ["-" * width for width in widths], *cells]:
        folded = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
        for line in itertools.zip_longest(*folded, fillvalue=""):
            texts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
            print("  ".join(texts).rstrip(), file=_console.file)
    _console.file.flush()


class Progress:
    """Progress over steps: a live bar on a terminal, otherwise one line at most every ``every_seconds``."""

    def __init__(self, label: str, total: int, *, start: int = 0, every_seconds: float = 10.0) -> None:
        self.label, self.total, self.step, self.every_seconds = label, total, start, every_seconds
        self._printed = (-1, float("-inf"))  # step and time of the last plain line
        self._metrics: Mapping[str, float] = {}
        self._live: RichProgress | None = None
        if terminal := live_terminal():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
            )
            values = TextColumn("{task.fields[values]}", markup=False)
            self._live = RichProgress(*columns, TimeRemainingColumn(), values, console=terminal)
            self._task = self._live.add_task(label, total=total, completed=start, values="")

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Show that ``step`` of ``total`` steps are done, with the few metrics given."""
        self.step = step
        self._metrics = self._metrics if metrics is None else metrics
        if self._live:
            self._live.update(self._task, completed=step, values=self._values())
        elif time.monotonic() - self._printed[1] >= self.every_seconds:
            self._line()

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        elif self._printed[0] not in (-1, self.step):  # the last step is always shown
            self._line()

    def _values(self) -> str:
        return "  ".join(f"{name} {_cell(value)}" for name, value in self._metrics.items())

    def _line(self) -> None:
        self._printed = (self.step, time.monotonic())
        if as_json():
            print(json.dumps({"stage": self.label, "step": self.step, **self._metrics}), flush=True)
        else:
            print(f"{self.label} {self.step}/{self.total}  {self._values()}".rstrip(), flush=True)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
