"""Handing jobs to workers by availability: a job goes to whoever is free first, so a slow worker delays nothing.

A job is ready when the jobs that it needs the values of have ended; ready jobs are handed out in the order in which
they became ready, one at a time to each worker.  One thread does that and whatever else it is asked to, so no caller
ever waits to ask, and what it alone touches needs no lock.

Left out on purpose: Ray, and what a worker is or does when it dies.  A job is whole until nobody holds it, so its crew
can hand it out again, and even after it has ended, when its value is lost.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

from rlhf_ray.workers.groups import Given

WATCH_SECONDS = 0.5
"""Between two looks at what takes too long."""
MOST_LOSSES = 10
"""Times that a call may be tried again because a value was lost, which no worker's death counts."""

_renewing = Lock()


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class Job:
    """One call of a method, whichever worker carries it out."""

    method: str
    arguments: tuple[Any, ...]
    given: Given | None
    """What the worker must hold before it begins."""
    what: str
    """Who is asked for what, as an error names it."""
    course: int = 0
    """Which of a crew's courses it belongs to; one that the crew has left is not carried out."""
    ended: Future[Any] = field(default_factory=Future)
    """Where its value is, once it is there; the value may be the error that the method raised."""
    losses: int = 0
    """How often its value, or one that it needs, was lost."""

    def settle(self, value: Any) -> None:
        """Say where the value is; one that was given up meanwhile stays so."""
        if not self.ended.done():
            self.ended.set_result(value)

    def give_up(self, error: BaseException) -> None:
        """Raise an error where the value is waited for."""
        if not self.ended.done():
            self.ended.set_exception(error)

    def is_at(self, value: str) -> bool:
        """Whether its value is there, and is the object of this hexadecimal name."""
        return self.ended.done() and not self.ended.exception() and self.ended.result().hex() == value

    def may_try_again(self) -> bool:
        """Count one more loss; whether there have not been too many."""
        self.losses += 1
        return self.losses <= MOST_LOSSES

    def renew(self, value: Any) -> bool:
        """Have it end once more, as its value is lost; False when somebody has seen to that already."""
        with _renewing:
            if not self.ended.done() or self.ended.exception() or self.ended.result() is not value:
                return False
            self.ended = Future()
            return True


class Dispatcher:
    """Jobs in, jobs out to workers that are known by their ranks."""

    def __init__(self, start: Callable[[int, Job], None], watch: Callable[[], None], *, name: str) -> None:
        """``start(rank, job)`` begins a job without waiting; ``watch`` is called every now and then by the same thread.

        Nobody is there before `free` says so.
        """
        self._start, self._watch = start, watch
        self._idle: dict[int, None] = {}  # the one that has been free for longest comes first
        self._ready: deque[Job] = deque()
        self._events: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name=f"{name} dispatcher", daemon=True)
        self._thread.start()

    def submit(self, job: Job, needs: Sequence[Future[Any]] = ()) -> None:
        """Hand the job out when everything that it needs is there and a worker is free."""
        missing = [need for need in needs if not need.done()]
        if not missing:
            self.post(partial(self._ready.append, job))
            return
        waiting, rest = [job], missing[1:]  # both let go when it is there: it may live as long as the job's arguments
        missing[0].add_done_callback(lambda _: self.submit(waiting.pop(), rest))

    def again(self, job: Job) -> None:
        """Hand a job out before all others; in the dispatcher's own thread, as are the next two."""
        self._ready.appendleft(job)

    def free(self, rank: int) -> None:
        """Say that a worker is there for a job."""
        self._idle[rank] = None

    def gone(self, rank: int) -> None:
        """Say that a worker is not there after all."""
        self._idle.pop(rank, None)

    def post(self, event: Callable[[], None]) -> None:
        """Have something done by the dispatcher's thread."""
        self._events.put(event)

    def when_done(self, future: Future[Any], event: Callable[..., None], *arguments: Any) -> None:
        """`post` an event, with the Future as its last argument, when that has ended."""
        future.add_done_callback(lambda done: self.post(partial(event, *arguments, done)))

    def carry_out(self, event: Callable[[], None]) -> None:
        """`post`, and wait until it is done."""
        done: Future[None] = Future()

        def both() -> None:
            try:
                event()
            except Exception as error:  # the caller's to hear of
                done.set_exception(error)
            else:
                done.set_result(None)

        self.post(both)
        done.result()

    def stop(self) -> None:
        """Hand out no more; waits for what is being done."""
        self._events.put(None)
        self._thread.join()

    def _run(self) -> None:
        look = time.monotonic() + WATCH_SECONDS
        while True:
            with suppress(Empty):
                event = self._events.get(timeout=max(0.0, look - time.monotonic()))
                if event is None:
                    return
                event()
                del event  # and what it holds on to
            if time.monotonic() >= look:
                self._watch()
                look = time.monotonic() + WATCH_SECONDS
            while self._idle and self._ready:
                rank = next(iter(self._idle))
                self.gone(rank)
                self._start(rank, self._ready.popleft())
