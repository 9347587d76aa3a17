"""Ctrl-C between two pieces of an answer, never inside one.

Python raises KeyboardInterrupt wherever it happens to be, and drops it when that is a destructor or a callback: the
answer would go on.  Here the signal is remembered and raised at the next piece.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

X = TypeVar("X")


class Interrupt:
    """A context in which Ctrl-C waits for the next piece; a second one does not."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> Interrupt:
        self._before: Any = signal.signal(signal.SIGINT, self._on)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def between(self, pieces: Iterator[X]) -> Iterator[X]:
        """The pieces; raises KeyboardInterrupt after the one during which Ctrl-C was pressed."""
        for piece in pieces:
            yield piece
            if self.pressed:
                raise KeyboardInterrupt
