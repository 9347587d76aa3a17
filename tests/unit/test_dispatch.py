"""Handing out jobs by availability, with workers that end a job when the test says so."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any

from rlhf_ray.runtime.dispatch import Dispatcher, Job


def job(method: str, **more: Any) -> Job:
    return Job(method=method, arguments=(), given=None, what=method, **more)


class Desk:
    """A dispatcher, and what it has begun: (rank, methods) in order."""

    def __init__(self, size: int) -> None:
        self.begun: SimpleQueue[tuple[int, str]] = SimpleQueue()
        self.looks: SimpleQueue[None] = SimpleQueue()
        start = lambda rank, jobs: self.begun.put((rank, "".join(job.method for job in jobs)))  # noqa: E731
        self.dispatcher = Dispatcher(start, lambda: self.looks.put(None), name="test", size=size)
        for rank in range(size):
            self.free(rank)

    def free(self, rank: int) -> None:
        self.dispatcher.post(partial(self.dispatcher.free, rank))

    def submit(self, *methods: str, needs: tuple[Future[None], ...] = (), **more: Any) -> None:
        for method in methods:
            self.dispatcher.submit(job(method, **more), needs)

    def next(self) -> tuple[int, str]:
        return self.begun.get(timeout=30)


def test_a_slow_worker_gets_one_job_and_the_fast_one_the_rest() -> None:
    desk = Desk(2)
    desk.submit(*"abcde")
    assert [desk.next(), desk.next()] == [(0, "a"), (1, "b")]
    for method in "cde":  # worker 0 is still at its first
        assert desk.begun.empty()
        desk.free(1)
        assert desk.next() == (1, method)
    desk.submit("f")
    desk.dispatcher.carry_out(lambda: None)
    queue = desk.dispatcher.queue
    assert ([job.method for job in queue.ready], queue.under_way) == (["f"], {0: 1, 1: 1})
    desk.free(0)
    assert desk.next() == (0, "f")
    desk.free(0)
    desk.dispatcher.stop()
    assert not queue.ready and queue.under_way == {1: 1}
    assert [wait.name for wait in queue.waits] == [*"abcdef"]
    assert all(0 < wait.begun <= wait.ended for wait in queue.waits)


def test_a_job_waits_for_what_it_needs_and_others_pass_it() -> None:
    desk = Desk(1)
    first: Future[None] = Future()
    second: Future[None] = Future()
    desk.submit("late", "later", needs=(first, second))
    desk.submit("early")
    assert desk.next() == (0, "early")
    desk.free(0)
    second.set_result(None)
    assert desk.begun.empty()
    first.set_exception(ValueError("a value that never came"))  # is raised where the job begins
    assert desk.next() == (0, "late")
    desk.free(0)
    assert desk.next() == (0, "later")
    desk.dispatcher.stop()


def test_joined_jobs_that_are_ready_together_go_together_a_workers_share_at_a_time() -> None:
    desk = Desk(2)
    first: Future[None] = Future()
    desk.submit(*"aaaaaaaab", needs=(first,), joined=True)
    desk.submit(*"aa", joined=True)
    assert [desk.next(), desk.next()] == [(0, "a"), (1, "a")]  # how long they take is not known yet
    desk.dispatcher.carry_out(lambda: desk.dispatcher.took([job("a", joined=True)], 1.0, limit=16.0))
    desk.dispatcher.carry_out(lambda: first.set_result(None))
    for methods in ("aaaa", "aaa", "a", "b"):  # a quarter of the limit, half of those that are left, those of a method
        desk.free(0)
        assert desk.next() == (0, methods)
    desk.submit(*"cc")
    desk.submit(*"cc", joined=True, course=1)
    desk.submit(*"cc", joined=True, course=2)
    desk.dispatcher.post(lambda: desk.dispatcher.again(job("d", joined=True), job("d", joined=True)))
    for methods in ("d", "d", "c", "c", "cc", "c", "c"):
        desk.free(0)
        assert desk.next() == (0, methods)
    desk.dispatcher.stop()


def test_a_dead_workers_job_goes_first_and_to_one_that_is_there() -> None:
    desk = Desk(2)
    desk.submit("a")
    assert desk.next() == (0, "a")

    def dies() -> None:
        desk.dispatcher.gone(1)  # the other one, while it does nothing
        for method in "cb":
            desk.dispatcher.again(job(method))

    desk.dispatcher.post(dies)
    desk.submit("d")
    for method in "bcd":
        desk.free(0)
        assert desk.next() == (0, method)
        assert desk.begun.empty()
    assert desk.looks.get(timeout=30) is None  # it looks around though nothing happens
    desk.dispatcher.stop()


def test_a_job_that_nobody_holds_is_gone_though_what_it_needed_lives() -> None:
    """Otherwise a batch would keep alive the weights that it was sampled with."""
    desk = Desk(1)
    need: Future[None] = Future()
    waiting = job("a")
    gone = weakref.ref(waiting)
    desk.dispatcher.submit(waiting, [need])
    del waiting
    gc.collect()
    assert gone() is not None
    need.set_result(None)
    assert desk.next() == (0, "a")
    desk.submit("b")  # what is done last is still in the thread's hands
    desk.free(0)
    assert desk.next() == (0, "b")
    desk.dispatcher.stop()
    assert gone() is None


def test_a_lost_value_is_waited_for_once_more() -> None:
    lost = job("a")
    lost.settle("first")
    assert lost.renew("first") and not lost.renew("first")
    assert not lost.ended.done()
    lost.settle("second")
    assert lost.ended.result() == "second" and not lost.renew("first")
    lost.give_up(ValueError("too late"))
    assert lost.ended.result() == "second"
