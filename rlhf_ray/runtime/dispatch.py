"""Handing jobs to workers by availability: a job goes to whoever is free first, so a slow worker delays nothing.

A job is ready when the jobs that it needs the values of have ended; ready jobs are handed out in the order in which
they became ready.  A worker gets one at a time, or, of jobs that may be ``joined``, those of one method that are ready
when it is: its share of them, so none waits for another to come, and a worker that keeps up gets one at a time still.
One thread does that and whatever else it is asked to, so no caller ever waits to ask, and what it alone touches needs
no lock.

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

from rlhf_ray.rundir.trace import Span
from rlhf_ray.workers.groups import Given

WATCH_SECONDS = 1.0
"""Between two looks at what takes too long."""
MOST_LOSSES = 10
"""Times that a call may be tried again because a value was lost, which no worker's death counts."""

MOST_JOINED = 8
"""Jobs that a worker is handed at once."""
KEPT_WAITS = 10_000
"""Newest jobs of which is known how long they waited for a worker."""
JOINED_SHARE = 0.25
"""Of the time limit of a call, that joined jobs are to take, by how long the last ones took."""

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
    joined: bool = False
    """Whether it may be handed out with others, each carried out by itself, one after the other."""
    course: int = 0
    """Which of a crew's courses it belongs to; one that the crew has left is not carried out."""
    ended: Future[Any] = field(default_factory=Future)
    """Where its value is, once it is there; the value may be the error that the method raised."""
    losses: int = 0
    """How often its value, or one that it needs, was lost."""
    ready: int = 0
    """Since when it waits for a worker, in unix nanoseconds."""

    def joins(self, other: Job) -> bool:
        """Whether a worker may be handed both at once."""
        kinds = [(job.joined, job.method, job.given, job.course) for job in (self, other)]
        return self.joined and kinds[0] == kinds[1]

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


def give_up(jobs: Sequence[Job], error: BaseException) -> None:
    """Raise an error where any of the values is waited for."""
    for job in jobs:
        job.give_up(error)


class Queue:
    """Jobs on their way to workers; the dispatcher's thread changes it, and anybody may look at the numbers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready: deque[Job] = deque()
        self.under_way: dict[int, int] = {}
        """How many jobs a worker is at, by its rank."""
        self.waits: deque[Span] = deque(maxlen=KEPT_WAITS)
        """How long jobs waited between being ready and being begun, the newest last."""

    def put(self, *jobs: Job, first: bool = False) -> None:
        """Add jobs that are ready."""
        for job in jobs:
            job.ready = time.time_ns()
        self.ready.extendleft(reversed(jobs)) if first else self.ready.extend(jobs)

    def note(self, rank: int, jobs: Sequence[Job]) -> None:
        """Note that a worker begins with jobs."""
        now = time.time_ns()
        self.under_way[rank] = len(jobs)
        self.waits.extend(Span(row=self.name, name=job.method, begun=job.ready, ended=now) for job in jobs)


class Dispatcher:
    """Jobs in, jobs out to workers that are known by their ranks."""

    def __init__(
        self, start: Callable[[int, list[Job]], None], watch: Callable[[], None], *, name: str, size: int
    ) -> None:
        """``start(rank, jobs)`` begins jobs without waiting; ``watch`` is called now and then by the same thread.

        There are ``size`` workers, but nobody is there before `free` says so.
        """
        self._start, self._watch, self._size = start, watch, size
        self._most = 1
        self._idle: dict[int, None] = {}  # the one that has been free for longest comes first
        self.queue = Queue(name)
        self._events: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name=f"{name} dispatcher", daemon=True)
        self._thread.start()

    def submit(self, job: Job, needs: Sequence[Future[Any]] = ()) -> None:
        """Hand the job out when everything that it needs is there and a worker is free."""
        missing = [need for need in needs if not need.done()]
        if not missing:
            self.post(partial(self.queue.put, job))
            return
        waiting, rest = [job], missing[1:]  # both let go when it is there: it may live as long as the job's arguments
        missing[0].add_done_callback(lambda _: self.submit(waiting.pop(), rest))

    def again(self, *jobs: Job) -> None:
        """Hand jobs out before all others, and one by one, as one of them may be the end of whoever has it.

        In the dispatcher's own thread, as are the next three.
        """
        for job in jobs:
            job.joined = False
        self.queue.put(*jobs, first=True)

    def free(self, rank: int) -> None:
        """Say that a worker is there for a job."""
        self._idle[rank] = None
        self.queue.under_way.pop(rank, None)

    def gone(self, rank: int) -> None:
        """Say that a worker is not there after all."""
        self._idle.pop(rank, None)
        self.queue.under_way.pop(rank, None)

    def took(self, jobs: Sequence[Job], seconds: float, *, limit: float) -> None:
        """Note how long jobs took, so that joined ones stay far below the limit of a call."""
        if jobs[0].joined:
            self._most = min(MOST_JOINED, int(len(jobs) * JOINED_SHARE * limit / max(seconds, 1e-3)))

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
            while self._idle and self.queue.ready and self._events.empty():  # what else has ended may be joined
                rank = next(iter(self._idle))
                self.gone(rank)
                jobs = self._take()
                self.queue.note(rank, jobs)
                self._start(rank, jobs)
                del jobs  # and what they hold on to

    def _take(self) -> list[Job]:
        """The first job that is ready, with a worker's share of those behind it that join it."""
        ready = self.queue.ready
        share = min(self._most, -(-len(ready) // self._size))
        jobs = [ready.popleft()]
        while ready and len(jobs) < share and ready[0].joins(jobs[0]):
            jobs.append(ready.popleft())
        return jobs
