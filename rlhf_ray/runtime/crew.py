"""Workers as Ray actors.

A call returns at once with a handle, and is carried out by whichever actor is free first (`Dispatcher`).  A handle
among the arguments of another call travels as a reference, so values go from actor to actor and never through the
driver.  With its value a call returns what it cost, so nobody has to ask a busy actor how much it has done.

Left out on purpose: replacing a dead worker.  ``_begin`` and ``_end`` are where a call starts and ends: a call that
died with its actor can be submitted again there, and ``given`` brings the new actor up to date before it begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from rlhf_ray.runtime.dispatch import Dispatcher, Job
from rlhf_ray.types import Done, Usage
from rlhf_ray.workers.groups import Given

ASIDE = "aside"


def wait_for(ref: Any, what: str, timeout: float) -> Any:
    """Wait for a reference's value; raises what the call raised, or TimeoutError naming the call.

    A ValueError, which a user can mend, arrives as itself; anything else as Ray's error with the remote traceback.
    """
    try:
        return ray.get(ref, timeout=timeout)
    except GetTimeoutError as error:
        raise TimeoutError(f"no answer to {what} after {timeout:g} s") from error
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise


@dataclass(frozen=True, slots=True)
class Pending:
    """The handle of a call that a crew has been asked for."""

    job: Job
    timeout: float
    """Seconds."""

    def result(self) -> Any:
        """Wait for the value; raises what the call raised, or TimeoutError naming the call."""
        try:
            ref = self.job.ended.result(self.timeout)
        except TimeoutError as error:
            raise TimeoutError(f"no answer to {self.job.what} after {self.timeout:g} s") from error
        return wait_for(ref, self.job.what, self.timeout)


class WorkerActor:
    """An actor that holds a worker.

    The worker is built by a call: what an actor's own constructor raises, Ray gives back as text alone.
    """

    def __init__(self, label: str) -> None:
        self.label = label

    def build(self, worker_class: type[Any], arguments: dict[str, Any]) -> None:
        """Construct the worker, its arguments given as references."""
        values = ray.get(list(arguments.values()))
        self.worker = worker_class(**dict(zip(arguments, values, strict=True)))

    @ray.method(num_returns=2)
    def call(self, given: str | None, value: Any, method: str, *arguments: Any) -> tuple[Any, Usage]:
        """What the worker's method returns, after ``given(value)`` if there is one, and the work since the last call.

        The value is an argument of its own, because Ray resolves references at this level alone.
        """
        if given is not None:
            getattr(self.worker, given)(value)
        return getattr(self.worker, method)(*arguments), self.worker.usage()

    def aside(self, method: str, *arguments: Any) -> Any:
        """What the worker's method returns, carried out beside other calls."""
        return getattr(self.worker, method)(*arguments)

    def __repr__(self) -> str:
        return self.label


class RayCrew:
    """Equal actors of one role, started in parallel."""

    def __init__(
        self,
        worker_class: type[Any],
        arguments: dict[str, Any],
        *,
        role: str,
        size: int,
        cpus: float,
        gpus: float,
        timeout: float,
        aside: bool = False,
    ) -> None:
        """Start ``size`` actors of ``worker_class(**arguments)``; ``timeout`` seconds bound every wait.

        With ``aside`` an actor has a second thread for `aside`; without it, calls run in the actor's main thread.
        """
        self.role, self.size, self.timeout = role, size, timeout
        groups = {"concurrency_groups": {ASIDE: 1}} if aside else {}
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, **groups)(WorkerActor)
        shared = {name: ray.put(value) for name, value in arguments.items()}
        self.actors = [remote.remote(f"{role} worker {rank}") for rank in range(size)]
        self._built = [actor.build.remote(worker_class, shared) for actor in self.actors]
        self._holds: list[Given | None] = [None] * size
        self._used = Usage(workers=size)
        self._lock = Lock()
        self._dispatcher = Dispatcher(size, self._begin, name=role)

    def wait_until_built(self) -> None:
        """Wait for every worker's constructor; raises what one of them raised."""
        for rank, ref in enumerate(self._built):
            wait_for(ref, f"{self.role} worker {rank}: start", self.timeout)

    def call(self, method: str, *arguments: Any, given: Given | None = None) -> Pending:
        """Ask whoever is free first for a method."""
        job = Job(
            method=method, arguments=arguments, given=given, what=f"{self.role}: {method}, for which no worker is free"
        )
        handles = [*arguments, given.value] if given else arguments
        self._dispatcher.submit(job, [handle.job.ended for handle in handles if isinstance(handle, Pending)])
        return Pending(job, self.timeout)

    def aside(self, method: str, *arguments: Any) -> Any:
        """Have the only actor carry out a method beside its calls, and wait for it."""
        (actor,) = self.actors
        ref = actor.aside.options(name=f"{self.role}.{method}", concurrency_group=ASIDE).remote(method, *arguments)
        return wait_for(ref, f"{self.role} worker: {method}", self.timeout)

    def usage(self) -> Usage:
        """Work of all calls that have ended since this was last asked."""
        with self._lock:
            used, self._used = self._used, Usage(workers=self.size)
        return used

    def stop(self) -> None:
        """End every actor."""
        self._dispatcher.stop()
        for actor in self.actors:
            ray.kill(actor)

    def _begin(self, rank: int, job: Job) -> None:
        """Have one actor carry out a job."""
        job.what = f"{self.role} worker {rank}: {job.method}"
        given = job.given if job.given is not self._holds[rank] else None
        begin = self.actors[rank].call.options(name=f"{self.role}.{job.method}")
        try:
            update = (given.method, _reference(given.value)) if given else (None, None)
            ref, used = begin.remote(*update, job.method, *map(_reference, job.arguments))
        except Exception as error:  # it can't be sent: whoever waits for it must hear of it
            job.ended.set_exception(error)
            self._dispatcher.free(rank)
            return
        self._holds[rank] = job.given or self._holds[rank]
        used.future().add_done_callback(partial(self._end, rank, job, ref))

    def _end(self, rank: int, job: Job, ref: Any, used: Future[Usage]) -> None:
        """Note that a job has ended, in a thread of Ray's that must not be held up."""
        if used.exception() is None:
            with self._lock:
                self._used += replace(used.result(), workers=0)
        else:
            self._holds[rank] = None  # for it may have failed on the way there
        job.arguments, job.given = (), None  # what it held on to, such as an old policy's weights, can go
        job.ended.set_result(ref)
        self._dispatcher.free(rank)


def _reference(argument: Any) -> Any:
    """A handle as something that Ray hands over by reference, a value as itself."""
    if isinstance(argument, Pending):
        return argument.job.ended.result()
    return argument.value if isinstance(argument, Done) else argument


def wait_until_built(crews: Sequence[RayCrew]) -> None:
    """Wait for every worker's constructor; ends every actor and raises what one of them raised."""
    try:
        for crew in crews:
            crew.wait_until_built()
    except BaseException:  # Ctrl-C too: a joined cluster must not keep them
        stop(crews)
        raise


def stop(crews: Sequence[RayCrew]) -> None:
    """End every actor."""
    for crew in crews:
        crew.stop()
