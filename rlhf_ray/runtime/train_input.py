"""Inputs of coming steps, made in a thread while the present step computes.

What a step takes is a function of its number alone, so making it early changes nothing.  A device of its own computes
beside the thread; on a CPU the thread would only compete for the cores, so there nothing is made ahead: collation is
under one percent of a step, and is counted as waiting.

Left out on purpose: several threads; one collates faster than any device learns.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

AHEAD = {"cpu": 0, "cuda": 2}
"""Steps to make ahead, by the type of device."""


class Inputs(Generic[T]):
    """``make(step)`` for one step after the other, at most ``ahead`` steps early; 0 makes them when asked."""

    def __init__(self, make: Callable[[int], T], *, ahead: int) -> None:
        self._make, self._ahead = make, ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inputs") if ahead else None
        self._pending: dict[int, Future[T]] = {}

    def take(self, step: int) -> T:
        """The input of a step; raises what making it raised."""
        if self._thread is None:
            return self._make(step)
        for later in range(step, step + 1 + self._ahead):
            if later not in self._pending:
                self._pending[later] = self._thread.submit(self._make, later)
        return self._pending.pop(step).result()

    def forget(self) -> None:
        """Make anew what was made ahead: what it is made with has changed."""
        self._pending.clear()

    def __enter__(self) -> Inputs[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
