"""Workers as Ray actors, and what is done when one of them dies.

A call returns at once with a handle, and is carried out by whichever actor is free first (`Dispatcher`).  A handle
among the arguments of another call travels as a reference, so values go from actor to actor and never through the
driver.  With its value a call returns what it cost, so nobody has to ask a busy actor how much it has done.  Calls
that may be joined are one to Ray when they begin together, which is what keeps the driver's own time small.

An actor that dies, or takes longer over a call than it may, is replaced by a new one of its rank, and its call goes
before all others to whoever is free.  ``given`` brings the new actor up to date, so the value is the one that the dead
actor would have returned.  A value that was lost with the machine that it lay on is computed again, from arguments that
a call keeps until nobody holds its handle.

Workers ``together`` are the ranks of one: each carries out every call, and the first one's value counts.  They hold
what nobody else does, so when one dies every call raises `WorkerLost`, until `restart`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any

import ray
from ray.exceptions import RayError

from rlhf_ray.failures import Deaths, GaveUp, WorkerLost
from rlhf_ray.runtime.actor import (
    ASIDE,
    DEATHS,
    MACHINE_GONE,
    STORED,
    WorkerActor,
    cause_of_death,
    lost_object,
    plain,
    wait_for,
)
from rlhf_ray.runtime.dispatch import Dispatcher, Job, give_up
from rlhf_ray.runtime.life import Life
from rlhf_ray.runtime.pending import Pending, compute_argument_again, error_of_arguments, pending
from rlhf_ray.runtime.placement import Seat
from rlhf_ray.types import Usage
from rlhf_ray.workers.groups import Given


class RayCrew:
    """Actors of one role, started in parallel.  What comes below `_submit` is done by the dispatcher's thread."""

    def __init__(
        self,
        worker_class: Callable[..., Any],
        arguments: dict[str, Any],
        *,
        role: str,
        run: str = "default",
        seats: Sequence[Seat],
        own: Callable[[], Sequence[dict[str, Any]]] | None = None,
        deaths: Deaths,
        timeout: float,
        call_timeout: float | None = None,
        together: bool = False,
        beside: bool = False,
        borrows: bool = False,
    ) -> None:
        """Start ``worker_class(**arguments)`` in every seat.

        ``own`` gives what each worker's arguments differ in, a dictionary a seat, and is asked anew at every start.
        ``timeout`` and ``call_timeout`` are the seconds that a start and a call may take.  Workers ``together``, and
        those who are to do something ``beside`` their calls, have threads for that; other workers' calls run in their
        actors' main threads.  One that ``borrows`` what the learner has begins anew after it.
        """
        self.role, self.run, self.size, self.together, self.borrows = role, run, len(seats), together, borrows
        self.timeout, self.call_timeout, self.beside = timeout, call_timeout or timeout, beside
        groups = {"concurrency_groups": {ASIDE: 1, STORED: 1}} if together or beside else {}
        self._remotes = [ray.remote(**seat.options, **groups)(WorkerActor) for seat in seats]
        self._worker_class, self._own = worker_class, own or (lambda: [{}] * self.size)
        self._shared = {name: ray.put(value) for name, value in arguments.items()}
        self._deaths, self._course = deaths, 0
        self._failure: BaseException | None = None
        self._used, self._lock = Usage(workers=self.size), Lock()
        self._first_built: list[Future[None]] = []
        self._lives: list[Life] = []
        self._dispatcher = Dispatcher(self._begin, self._watch, name=role, size=1 if together else self.size)
        self.queue = self._dispatcher.queue
        self._dispatcher.carry_out(self._start_all)

    @property
    def actors(self) -> list[Any]:
        """Those that are there now."""
        return [actor for life in self._lives for actor in life.actors]

    @property
    def ready(self) -> dict[str, Any]:
        """Actors that have started, by their names."""
        return {name: actor for life in self._lives if life.built for name, actor in life.by_name.items()}

    def wait_until_built(self) -> None:
        """Wait until every worker has started; raises what a constructor raised."""
        for built in self._first_built:
            built.result()

    def call(self, method: str, *arguments: Any, given: Given | None = None, joined: bool = False) -> Pending:
        """Ask whoever is free first, or all together, for a method."""
        what = f"{self.role}: {method}"
        job = Job(method=method, arguments=arguments, given=given, what=what, joined=joined, course=self._course)
        self._submit(job)
        return Pending(job, self)

    def aside(self, method: str, *arguments: Any) -> Any:
        """Have the first actor carry out a method beside its calls, and wait for it; WorkerLost when it dies."""
        (life,) = self._lives
        who = life.names[0]
        try:
            return wait_for(life.aside(method, *arguments), f"{who}: {method}", self.call_timeout)
        except (TimeoutError, *DEATHS) as error:
            why = cause_of_death(error) or str(error)
            self._dispatcher.post(partial(self._end_of, life, who, why))
            raise WorkerLost(who, why) from error

    def tell(self, method: str) -> None:
        """Have every actor that is there carry out a method after what it is at."""
        for life in self._lives:
            if life.built:
                self._dispatcher.post(partial(life.tell, method))

    def usage(self) -> Usage:
        """Work of all calls that have ended since this was last asked."""
        with self._lock:
            used = self._used
            self._used = replace(used, tokens=0, seconds=0.0)
        return used

    def compute_again(self, job: Job, ref: Any) -> None:
        """Have a call carried out again whose value was lost, unless somebody has asked for that already."""
        if job.renew(ref):
            self._deaths.say(f"{job.what}: its value was lost with its machine; it is computed again")
            if self.together:
                self._dispatcher.post(partial(self._end_of, self._lives[0], self.role, MACHINE_GONE))
            self._submit(job)

    def abandon(self) -> None:
        """Carry out none of the calls that were asked for until now and have not begun."""
        self._course += 1

    def restart(self) -> None:
        """Have workers begin anew, with none of the calls that were asked for until now; waits for them."""
        self.abandon()
        self._dispatcher.carry_out(self._start_all)
        self.wait_until_built()

    def stop(self) -> None:
        """End every actor."""
        self._dispatcher.stop()
        for life in self._lives:
            life.end()

    def _submit(self, job: Job) -> None:
        self._dispatcher.submit(job, [handle.job.ended for handle in pending(job)])

    def _start_all(self) -> None:
        """Have every worker start, after ending those that are there."""
        for life in self._lives:
            self._retire(life)
        self._failure = None
        self._first_built = [Future() for _ in range(1 if self.together else self.size)]
        self._lives = [self._start(rank) for rank in range(len(self._first_built))]

    def _start(self, rank: int) -> Life:
        """Start the actor of a rank, or those of all ranks together."""
        ranks = range(self.size) if self.together else [rank]
        names = [f"{self.role} worker {rank}" for rank in ranks]
        own = self._own()  # put before actors are named, which waits for the head: a run whose head is gone ends here
        arguments = [self._shared | {name: ray.put(value) for name, value in own[rank].items()} for rank in ranks]
        life = Life(rank, self.role, names, [self._remotes[rank] for rank in ranks], self.run)
        for name, ref in zip(names, life.build(self._worker_class, arguments, seconds=self.timeout), strict=True):
            self._dispatcher.when_done(ref.future(), self._built, life, name)
        return life

    def _all_answered(self, life: Life, who: str, done: Future[Any]) -> bool:
        """Note how an actor has ended what it did; whether it was the last one."""
        error = done.exception()
        if error and (why := cause_of_death(error)):
            self._end_of(life, who, why)
            return False
        return life.has_answered(error)

    def _built(self, life: Life, who: str, done: Future[None]) -> None:
        """Note that an actor has started."""
        if life not in self._lives or self._failure or not self._all_answered(life, who, done):
            return
        if life.error:
            self._fail(plain(life.error))
            return
        life.built = True
        life.rest()
        if not self._first_built[life.rank].done():
            self._first_built[life.rank].set_result(None)
        self._dispatcher.free(life.rank)

    def _begin(self, rank: int, jobs: list[Job]) -> None:
        """Have a worker carry out jobs."""
        life = self._lives[rank]
        if jobs := [job for job in jobs if self._may_begin(job)]:
            try:
                answers = life.send(jobs, seconds=self.call_timeout)
            except Exception as error:  # they can't be sent: whoever waits for them must hear of it
                give_up(jobs, error)
            else:
                for name, (*_, used) in zip(life.names, answers, strict=True):
                    self._dispatcher.when_done(used.future(), self._ended, life, name, jobs, answers[0][:-1])
        if not life.jobs:
            self._dispatcher.free(rank)

    def _may_begin(self, job: Job) -> bool:
        """Whether a job can be carried out now; if it never can, whoever waits for it hears of it."""
        error = self._failure
        if job.course != self._course:
            error = error or WorkerLost(job.what, "it was asked for before the run went back")
        if not error and not all(handle.job.ended.done() for handle in pending(job)):
            self._submit(job)  # one is computed again
            return False
        if error := error or error_of_arguments(job):
            job.give_up(error)
        return not error

    def _ended(self, life: Life, who: str, jobs: list[Job], values: list[Any], done: Future[Usage]) -> None:
        """Note that an actor has ended its jobs."""
        if life.jobs is not jobs:
            return  # it was taken for dead
        if not done.exception():
            with self._lock:
                self._used += replace(done.result(), workers=0)
        if self._all_answered(life, who, done):
            self._dispatcher.took(jobs, time.monotonic() - life.begun, limit=self.call_timeout)
            life.rest()
            for job, value in zip(jobs, values, strict=True):
                self._settle(job, value, life.error)
            self._dispatcher.free(life.rank)

    def _settle(self, job: Job, ref: Any, error: BaseException | None) -> None:
        """Say where a job's value is, or have it carried out again if an argument was lost, or raise its error."""
        if error is None:
            job.settle(ref)
        elif job.course == self._course and (lost := lost_object(error)) and job.may_try_again():
            compute_argument_again(job, lost)
            job.joined = False  # what one misses is not to be another's loss again
            self._submit(job)
        else:
            job.give_up(plain(error))

    def _watch(self) -> None:
        """Look for what takes too long."""
        for life in [life for life in self._lives if life.deadline < time.monotonic()]:
            life.deadline = math.inf
            who = life.names[0]
            if life.error:
                self._fail(plain(life.error))
            elif life.jobs:
                self._end_of(life, who, f"no answer to {life.jobs[0].method} for {self.call_timeout:g} s")
            elif any(other.built for other in self._lives):
                self._deaths.say(f"{who} has not started within {self.timeout:g} s; the others go on without it")
            else:
                self._fail(TimeoutError(f"{who} has not started within {self.timeout:g} s"))

    def _end_of(self, life: Life, who: str, why: str) -> None:
        """Replace a worker that has died, and hand its jobs out again; fail where that can't be done."""
        if life not in self._lives or self._failure:
            return
        if self.together and life.built:
            self._fail(WorkerLost(who, why))
            return
        self._retire(life)
        try:
            if life.built or why != MACHINE_GONE:  # Ray may start one on a machine that it does not yet know is gone
                self._deaths.note(who, why, "replaced" + life.jobs_in_words)
            self._dispatcher.again(*life.jobs)
            self._lives[life.rank] = self._start(life.rank)
        except (GaveUp, RayError) as error:  # it was too often, or the head of the cluster does not answer
            self._fail(error)

    def _retire(self, life: Life) -> None:
        self._dispatcher.gone(life.rank)
        life.end()

    def _fail(self, error: BaseException) -> None:
        """Raise an error wherever a start or a value is waited for, from now on."""
        self._failure = error
        for built in self._first_built:
            if not built.done():
                built.set_exception(error)
        for life in self._lives:
            give_up(life.jobs, error)
            life.rest()
            self._dispatcher.free(life.rank)  # for jobs to come and hear of it
