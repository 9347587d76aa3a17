"""A worker inside a Ray actor, and what the errors of Ray calls mean.

Left out on purpose: what is done about them, which is the crew's.
"""

from __future__ import annotations

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

from rlhf_ray.runtime.tensors import send_as_arrays
from rlhf_ray.types import Usage

ASIDE = "aside"
MACHINE_GONE = "its machine is gone"
DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)


class WorkerActor:
    """An actor that holds a worker.

    The worker is built by a call: what an actor's own constructor raises, Ray gives back as text alone.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        send_as_arrays()

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


def wait_for(ref: Any, what: str, timeout: float) -> Any:
    """Wait for a reference's value; raises what the call raised, or TimeoutError naming the call."""
    try:
        return ray.get(ref, timeout=timeout)
    except GetTimeoutError as error:
        raise TimeoutError(f"no answer to {what} after {timeout:g} s") from error
    except RayTaskError as error:
        raise plain(error) from None


def plain(error: BaseException) -> BaseException:
    """A ValueError, which a user can mend, as itself; anything else as Ray's error with the remote traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(error, RayTaskError) and isinstance(cause, ValueError) else error


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
