"""The actors of a rank, from their start to their death.

Left out on purpose: who starts and replaces them, which is the crew's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import ray

from rlhf_ray.runtime.actor import ASIDE
from rlhf_ray.runtime.dispatch import Job
from rlhf_ray.runtime.pending import reference
from rlhf_ray.runtime.tensors import send_as_arrays
from rlhf_ray.workers.groups import Given


class Life:
    """One actor, or several that carry out every call together."""

    def __init__(self, rank: int, role: str, names: Sequence[str], remotes: Sequence[Any]) -> None:
        """Start the actors."""
        send_as_arrays()
        self.rank, self.role, self.names = rank, role, names
        self.actors = [remote.remote(name) for name, remote in zip(names, remotes, strict=True)]
        self.built = False
        self.job: Job | None = None
        self.error: BaseException | None = None
        """The first one that an actor raised over its job."""
        self.waiting = 0
        """Actors that are still at it."""
        self.deadline = math.inf
        """Until when they must be done, in monotonic seconds."""
        self._holds: Given | None = None

    def build(self, worker_class: type[Any], arguments: Sequence[dict[str, Any]], *, seconds: float) -> list[Any]:
        """Have each actor construct its worker; a reference for each, whose value says nothing."""
        self._begin(seconds)
        pairs = zip(self.actors, arguments, strict=True)
        return [actor.build.remote(worker_class, own) for actor, own in pairs]

    def send(self, job: Job, *, seconds: float) -> list[tuple[Any, Any]]:
        """Have the actors carry out a job; references to value and usage of each.

        Raises what the job's arguments raised.
        """
        given = job.given if job.given is not self._holds else None
        update = (given.method, reference(given.value)) if given else (None, None)
        arguments = [reference(argument) for argument in job.arguments]
        name = f"{self.role}.{job.method}"
        answers = [actor.call.options(name=name).remote(*update, job.method, *arguments) for actor in self.actors]
        job.what = f"{self.names[0]}: {job.method}"
        self.job, self.error = job, None
        self._holds = job.given or self._holds
        self._begin(seconds)
        return answers

    def aside(self, method: str, *arguments: Any) -> Any:
        """Have the first actor carry out a method beside its calls; a reference to its value."""
        call = self.actors[0].aside.options(name=f"{self.role}.{method}", concurrency_group=ASIDE)
        return call.remote(method, *arguments)

    def _begin(self, seconds: float) -> None:
        self.waiting, self.deadline = len(self.actors), time.monotonic() + seconds

    def rest(self) -> None:
        """Note that the actors have nothing to do; after an error they may not hold what they were given."""
        self.job, self.deadline = None, math.inf
        self._holds = None if self.error else self._holds

    def end(self) -> None:
        """Kill the actors, if they still live."""
        for actor in self.actors:
            ray.kill(actor)
