"""Workers as Ray actors.

A call returns at once with a handle; a handle among the arguments of another call travels as a reference, so the
next actor waits for the value and the driver does not.  Calls to one actor run in the order in which they were made.

Left out on purpose: replacing a dead worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError


@dataclass(frozen=True, slots=True)
class Pending:
    """The handle of a call that an actor has been asked for."""

    ref: Any
    what: str
    """Named when the wait takes too long."""
    timeout: float
    """Seconds."""

    def result(self) -> Any:
        """Wait for the value; raises what the call raised, or TimeoutError naming the call.

        A ValueError, which a user can mend, arrives as itself; anything else as Ray's error with the remote traceback.
        """
        try:
            return ray.get(self.ref, timeout=self.timeout)
        except GetTimeoutError as error:
            raise TimeoutError(f"no answer to {self.what} after {self.timeout:g} s") from error
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise error.cause from None
            raise


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

    def call(self, method: str, *arguments: Any) -> Any:
        """What the worker's method returns."""
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
    ) -> None:
        """Start ``size`` actors of ``worker_class(**arguments)``; ``timeout`` seconds bound every wait."""
        self.role = role
        self.size = size
        self.timeout = timeout
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus)(WorkerActor)
        shared = {name: ray.put(value) for name, value in arguments.items()}
        self.actors = [remote.remote(f"{role} worker {rank}") for rank in range(size)]
        self.built = [
            Pending(actor.build.remote(worker_class, shared), f"{role} worker {rank}: start", timeout)
            for rank, actor in enumerate(self.actors)
        ]

    def call(self, rank: int, method: str, *arguments: Any) -> Pending:
        """Ask one actor for a method."""
        values = [argument.ref if isinstance(argument, Pending) else argument for argument in arguments]
        ref = self.actors[rank].call.options(name=f"{self.role}.{method}").remote(method, *values)
        return Pending(ref, f"{self.role} worker {rank}: {method}", self.timeout)


def wait_until_built(crews: Sequence[RayCrew]) -> None:
    """Wait for every worker's constructor; ends every actor and raises what one of them raised."""
    try:
        for crew in crews:
            for pending in crew.built:
                pending.result()
    except BaseException:  # Ctrl-C too: a joined cluster must not keep them
        stop(crews)
        raise


def stop(crews: Sequence[RayCrew]) -> None:
    """End every actor."""
    for crew in crews:
        for actor in crew.actors:
            ray.kill(actor)
