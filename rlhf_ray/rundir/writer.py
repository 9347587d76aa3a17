"""Writing behind the caller's back: one thread, in the order asked for, a few jobs ahead at most.

The first error ends it: no later job is carried out, so that nothing claims to follow what was never written, and the
error is raised by the next `submit` or `wait`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

MOST_WAITING = 8
"""Jobs that may wait; beyond that `submit` waits with them."""


class Writer:
    """A thread that writes, from the first `submit` to `close`."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._waiting: deque[Future[None]] = deque()
        self._last: Future[None] | None = None

    def submit(self, job: Callable[..., object], *arguments: Any) -> Future[None]:
        """Carry a job out after those before it; raises the error of an earlier one."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= MOST_WAITING):
            self._waiting[0].result()  # stays where it is when it raises: every later call raises it too
            self._waiting.popleft()
        self._last = self._thread.submit(_after, self._last, job, *arguments)
        self._waiting.append(self._last)
        return self._last

    def wait(self, *, quietly: bool = False) -> None:
        """Wait until everything is written; raises the first error, unless ``quietly``."""
        wait(self._waiting)
        while self._waiting and not quietly:
            self._waiting[0].result()
            self._waiting.popleft()

    def close(self, *, quietly: bool = False) -> None:
        """`wait`, and end the thread; a second call does nothing."""
        try:
            self.wait(quietly=quietly)
        finally:
            self._waiting.clear()
            self._thread.shutdown()


def _after(before: Future[None] | None, job: Callable[..., object], *arguments: Any) -> None:
    if before is not None:
        before.result()  # there already, as there is one thread: this only passes on its error
    job(*arguments)
