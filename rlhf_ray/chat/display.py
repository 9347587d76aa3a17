"""Where answers and notices go: a terminal, or a pipe that gets the answers alone.

Left out on purpose: Markdown rendering; small models speak plain text.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_CONTROL = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """The text with control characters replaced, so that no sample can steer the terminal."""
    return text.translate(_CONTROL)


class Display:
    """Shows one answer as it comes, or two side by side."""

    def __init__(self, *, interactive: bool, out: TextIO | None = None) -> None:
        self.interactive = interactive
        self.out = sys.stdout if out is None else out
        self.console = Console(file=self.out, highlight=False)

    def notice(self, text: str) -> None:
        """A word to the person: on the terminal, or on standard error when standard output is piped."""
        if self.interactive:
            self.console.print(text, style="dim", markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def stream(self, pieces: Iterator[str], said: list[str]) -> None:
        """Print an answer's pieces as they come, each also appended to ``said``."""
        try:
            for piece in pieces:
                said.append(piece)
                self.out.write(printable(piece))
                self.out.flush()
        finally:
            self.out.write("\n")
            self.out.flush()

    def side_by_side(self, names: Sequence[str], answers: Sequence[Iterator[str]], said: Sequence[list[str]]) -> None:
        """Print several answers: growing columns on a terminal, labelled blocks in a pipe."""
        if not self.interactive:
            for name, pieces, words in zip(names, answers, said, strict=True):
                self.out.write(f"[{name}]\n")
                self.stream(pieces, words)
            return
        with Live(_columns(names, said), console=self.console, auto_refresh=False) as live:
            for _ in _in_turns(answers, said):
                live.update(_columns(names, said), refresh=True)


def _in_turns(answers: Sequence[Iterator[str]], said: Sequence[list[str]]) -> Iterator[None]:
    """Take one piece of each answer in turns until all have ended."""
    open_answers = list(zip(answers, said, strict=True))
    while open_answers:
        for pair in list(open_answers):
            piece = next(pair[0], None)
            if piece is None:
                open_answers.remove(pair)
            else:
                pair[1].append(piece)
        yield


def _columns(names: Sequence[str], said: Sequence[Sequence[str]]) -> Table:
    table = Table(expand=True)
    for name in names:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*(Text(printable("".join(pieces))) for pieces in said))
    return table
