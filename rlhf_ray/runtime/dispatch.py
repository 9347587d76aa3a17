"""Handing jobs to workers by availability: a job goes to whoever is free first, so a slow worker delays nothing.

A job is ready when the jobs that it needs the values of have ended; ready jobs are handed out in the order in which
they became ready, one at a time to each worker.  One thread of its own does it, so no caller ever waits to ask.

Left out on purpose: Ray, and what a worker is.  Giving a job to another worker when its first one died is for the
crew: the job is whole, and `submit` takes it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

from rlhf_ray.workers.groups import Given


@dataclass(slots=True, kw_only=True)
class Job:
    """One call of a method, whichever worker carries it out."""

    method: str
    arguments: tuple[Any, ...]
    given: Given | None
    """What the worker must hold before it begins."""
    what: str
    """Who is asked for what, as the error of a wait that takes too long names it."""
    ended: Future[Any] = field(default_factory=Future)
    """Where its value is, once it is there; the value may be the error that the method raised."""


class Dispatcher:
    """Jobs in, jobs out to ``size`` workers, numbered from 0."""

    def __init__(self, size: int, start: Callable[[int, Job], None], *, name: str) -> None:
        """``start(rank, job)`` begins a job without waiting; `free` is called with the rank when it has ended."""
        self._start = start
        self._idle = deque(range(size))
        self._ready: deque[Job] = deque()
        self._events: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        Thread(target=self._run, name=f"{name} dispatcher", daemon=True).start()

    def submit(self, job: Job, needs: Sequence[Future[Any]] = ()) -> None:
        """Hand the job out when everything that it needs is there and a worker is free."""
        missing = [need for need in needs if not need.done()]
        if not missing:
            self._events.put(partial(self._ready.append, job))
            return
        first, rest = missing[0], missing[1:]  # apart, so that what was waited for does not hold on to itself
        first.add_done_callback(lambda _: self.submit(job, rest))

    def free(self, rank: int) -> None:
        """Say that a worker has ended its job."""
        self._events.put(partial(self._idle.append, rank))

    def stop(self) -> None:
        """Hand out no more."""
        self._events.put(None)

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            event()
            while self._idle and self._ready:
                self._start(self._idle.popleft(), self._ready.popleft())
