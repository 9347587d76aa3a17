"""Handing out jobs by availability, with workers that end a job when the test says so."""

from __future__ import annotations

from concurrent.futures import Future
from queue import SimpleQueue

from rlhf_ray.runtime.dispatch import Dispatcher, Job


class Desk:
    """A dispatcher, and what it has begun: (rank, method) in order."""

    def __init__(self, size: int) -> None:
        self.begun: SimpleQueue[tuple[int, str]] = SimpleQueue()
        self.dispatcher = Dispatcher(size, lambda rank, job: self.begun.put((rank, job.method)), name="test")

    def submit(self, *methods: str, needs: tuple[Future[None], ...] = ()) -> None:
        for method in methods:
            self.dispatcher.submit(Job(method=method, arguments=(), given=None, what=method), needs)

    def next(self) -> tuple[int, str]:
        return self.begun.get(timeout=30)


def test_a_slow_worker_gets_one_job_and_the_fast_one_the_rest() -> None:
    desk = Desk(2)
    desk.submit(*"abcde")
    assert [desk.next(), desk.next()] == [(0, "a"), (1, "b")]
    for method in "cde":  # worker 0 is still at its first
        assert desk.begun.empty()
        desk.dispatcher.free(1)
        assert desk.next() == (1, method)
    desk.dispatcher.free(0)
    desk.submit("f")
    assert desk.next() == (0, "f")
    desk.dispatcher.stop()


def test_a_job_waits_for_what_it_needs_and_others_pass_it() -> None:
    desk = Desk(1)
    first: Future[None] = Future()
    second: Future[None] = Future()
    desk.submit("late", "later", needs=(first, second))
    desk.submit("early")
    assert desk.next() == (0, "early")
    desk.dispatcher.free(0)
    second.set_result(None)
    assert desk.begun.empty()
    first.set_exception(ValueError("a value that never came"))  # is raised where the job begins
    assert desk.next() == (0, "late")
    desk.dispatcher.free(0)
    assert desk.next() == (0, "later")
    desk.dispatcher.stop()
