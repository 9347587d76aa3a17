"""The actors of a rank, from their start to their death.

Left out on purpose: who starts and replaces them, which is the crew's.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import ray

from rlhf_ray.runtime.actor import ASIDE
from rlhf_ray.runtime.dispatch import Job
from rlhf_ray.runtime.pending import reference
from rlhf_ray.runtime.tensors import send_as_arrays
from rlhf_ray.workers.groups import Given

GRACE_SECONDS = 30.0
"""That the other ranks have after one's error: it may be the echo of a death that is not known of yet."""
_started: Counter[str] = Counter()


def _namespace() -> str:
    """Where Ray keeps the names of this process's actors, apart from those of other runs of the cluster."""
    return f"rlhf_ray {ray.get_runtime_context().get_job_id()}"


def _unused(name: str) -> str:
    """A name that no actor has had: Ray refuses one whose last bearer it does not yet know to be dead."""
    _started[name] += 1
    return f"{name} ({_started[name]})" if _started[name] > 1 else name


class Life:
    """One actor, or several that carry out every call together."""

    def __init__(self, rank: int, role: str, names: Sequence[str], remotes: Sequence[Any], run: str) -> None:
        """Start the actors."""
        send_as_arrays()
        self.rank, self.role, self.names = rank, role, names
        options = [{"name": _unused(f"{run}: {name}"), "namespace": _namespace()} for name in names]
        self.actors = [
            remote.options(**named).remote(name, role, run)
            for name, remote, named in zip(names, remotes, options, strict=True)
        ]
        self.by_name = dict(zip(names, self.actors, strict=True))
        self.built = False
        self.jobs: list[Job] = []
        self.error: BaseException | None = None
        """The first one that an actor raised over its jobs."""
        self.waiting = 0
        """Actors that are still at it."""
        self.deadline = math.inf
        """Until when they must be done, in monotonic seconds."""
        self.begun = 0.0
        """When they began, in monotonic seconds."""
        self._holds: Given | None = None

    def build(
        self, worker_class: Callable[..., Any], arguments: Sequence[dict[str, Any]], *, seconds: float
    ) -> list[Any]:
        """Have each actor construct its worker; a reference for each, whose value says nothing."""
        self._begin(seconds)
        pairs = zip(self.actors, arguments, strict=True)
        return [actor.build.remote(worker_class, own) for actor, own in pairs]

    def send(self, jobs: list[Job], *, seconds: float) -> list[list[Any]]:
        """Have the actors carry out jobs that are joined, all in so many seconds; references of each actor to the
        jobs' values and, at the end, the usage.

        Raises what the jobs' arguments raised.
        """
        first = jobs[0]
        given = first.given if first.given is not self._holds else None
        update = (given.method, reference(given.value)) if given else (None, None)
        arguments = [reference(argument) for job in jobs for argument in job.arguments]
        options = {"name": f"{self.role}.{first.method}", "num_returns": len(jobs) + 1}
        answers = [
            actor.call.options(**options).remote(*update, first.method, len(jobs), *arguments) for actor in self.actors
        ]
        for job in jobs:
            job.what = f"{self.names[0]}: {job.method}"
        self.jobs, self.error = jobs, None
        self._holds = first.given or self._holds
        self._begin(seconds)
        return answers

    def aside(self, method: str, *arguments: Any) -> Any:
        """Have the first actor carry out a method beside its calls; a reference to its value."""
        call = self.actors[0].aside.options(name=f"{self.role}.{method}", concurrency_group=ASIDE)
        return call.remote(method, *arguments)

    def tell(self, method: str) -> None:
        """Have the actors carry out a method after what they are at; one that dies of it is missed by its next call."""
        for actor in self.actors:
            actor.aside.options(name=f"{self.role}.{method}").remote(method)

    def _begin(self, seconds: float) -> None:
        self.waiting, self.begun = len(self.actors), time.monotonic()
        self.deadline = self.begun + seconds

    def has_answered(self, error: BaseException | None) -> bool:
        """Note that an actor has ended what it did, with an error or without; whether it was the last one."""
        if error and not self.error:
            self.error = error
            self.deadline = min(self.deadline, time.monotonic() + GRACE_SECONDS)
        self.waiting -= 1
        return not self.waiting

    def rest(self) -> None:
        """Note that the actors have nothing to do; after an error they may not hold what they were given."""
        self.jobs, self.deadline = [], math.inf
        self._holds = None if self.error else self._holds

    @property
    def jobs_in_words(self) -> str:
        """What becomes of its jobs when it dies."""
        count = len(self.jobs)
        return f", {count} job{'s' * (count > 1)} handed out again" if count else ""

    def end(self) -> None:
        """Kill the actors, if they still live."""
        for actor in self.actors:
            ray.kill(actor)
