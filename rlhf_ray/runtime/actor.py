"""A worker inside a Ray actor, and what the errors of Ray calls mean.

Left out on purpose: what is done about them, which is the crew's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from rlhf_ray import profiling
from rlhf_ray.failures import WorkerLost
from rlhf_ray.runtime.metrics import WorkerMetrics
from rlhf_ray.runtime.tensors import send_as_arrays
from rlhf_ray.workers.direct import Notice

ASIDE, STORED = "aside", "stored"
"""Threads of an actor beside that of its calls."""
MACHINE_GONE = "its machine is gone"
DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)


class WorkerActor:
    """An actor that holds a worker.

    The worker is built by a call: what an actor's own constructor raises, Ray gives back as text alone.
    """

    def __init__(self, label: str, role: str, run: str) -> None:
        self.label, self.role = label, role
        self._stored: dict[str, Any] = {}
        self._metrics = WorkerMetrics(run=run, role=role, worker=label)
        send_as_arrays()

    def build(self, worker_class: Callable[..., Any], arguments: dict[str, Any]) -> None:
        """Construct the worker, its arguments given as references."""
        values = ray.get(list(arguments.values()))
        self.worker = worker_class(**dict(zip(arguments, values, strict=True)))

    def call(self, given: str | None, value: Any, method: str, times: int, *arguments: Any) -> tuple[Any, ...]:
        """What the worker's method returns, after ``given(value)`` if there is one, and `Usage` since the last call.

        The method is called so many ``times``, each time with as many of the arguments.  Value and arguments are not
        in lists of their own, because Ray resolves references at this level alone.
        """
        if given is not None:
            with profiling.span(f"{self.role}.{given}"):
                value.give_to(self.worker) if isinstance(value, Published) else getattr(self.worker, given)(value)
        each = len(arguments) // times
        values = [self._work(method, *arguments[i * each : (i + 1) * each]) for i in range(times)]
        used = self.worker.usage()
        self._metrics.note(used)
        return *values, used

    def _work(self, method: str, *arguments: Any) -> Any:
        with profiling.span(f"{self.role}.{method}"):
            value = getattr(self.worker, method)(*arguments)
        if isinstance(value, Notice):
            return Published(notice=value, who=self.label, keeper=ray.get_runtime_context().current_actor)
        return value

    def aside(self, method: str, *arguments: Any) -> Any:
        """What the worker's method returns, carried out beside other calls."""
        return getattr(self.worker, method)(*arguments)

    def trace(self, what: str, *arguments: Any) -> str:
        """Do this process's part in a trace; returns the name under which Ray notes what it does."""
        getattr(profiling, what)(*arguments)
        return ray.get_runtime_context().get_worker_id()

    def stored(self, notice: Notice) -> list[Any]:
        """A reference to weights that went out directly, put into the store when somebody first asks; beside calls."""
        weights = notice.weights
        if weights.digest not in self._stored:  # a run that goes back has a version twice
            self._stored = {weights.digest: ray.put(self.worker.kept_weights(weights.policy_version))}
        return [self._stored[weights.digest]]  # in a list, or Ray would send the value

    def __repr__(self) -> str:
        return self.label


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A notice of weights on its way to those who take them."""

    notice: Notice
    who: str
    keeper: Any
    """The actor that keeps them, and its name."""

    def give_to(self, worker: Any) -> None:
        """Have a worker take the weights over, through the store if they have not come to it directly.

        Raises WorkerLost when their keeper is no more.
        """
        if worker.take(self.notice):
            return
        asked = self.keeper.stored.options(concurrency_group=STORED).remote(self.notice)
        try:
            (ref,) = ray.get(asked)
            weights = ray.get(ref)
        except (*DEATHS, ObjectLostError) as error:
            raise WorkerLost(self.who, cause_of_death(error) or MACHINE_GONE) from None
        worker.update_weights(weights)


def wait_for(ref: Any, what: str, timeout: float) -> Any:
    """Wait for a reference's value; raises what the call raised, or TimeoutError naming the call."""
    try:
        return ray.get(ref, timeout=timeout)
    except GetTimeoutError as error:
        raise TimeoutError(f"no answer to {what} after {timeout:g} s") from error
    except RayTaskError as error:
        raise plain(error) from None


def plain(error: BaseException) -> BaseException:
    """A ValueError, which a user can mend, or WorkerLost as itself; anything else as Ray's error with the remote
    traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(error, RayTaskError) and isinstance(cause, ValueError | WorkerLost) else error


def cause_of_death(error: BaseException) -> str | None:
    """How the actor died whose call ended in this error, in a few words; None when it lives."""
    if not isinstance(error, DEATHS) or isinstance(error, RayTaskError):
        return None
    text = str(error)
    if isinstance(error, NodeDiedError) or "node has died" in text or "node was terminated" in text:
        return MACHINE_GONE
    if isinstance(error, OutOfMemoryError) or "memory monitor" in text:
        return "its machine ran out of memory"
    return "its process ended: killed, out of memory or crashed"


def lost_object(error: BaseException) -> str | None:
    """Which object the call that ended in this error wanted and its machine had taken along; None for other errors."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return str(cause.object_ref_hex) if isinstance(cause, ObjectLostError) else None
