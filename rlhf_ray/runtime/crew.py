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
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus)(worker_class)
        shared = {name: ray.put(value) for name, value in arguments.items()}
        self.actors = [remote.remote(**shared) for _ in range(size)]

    def call(self, rank: int, method: str, *arguments: Any) -> Pending:
        """Ask one actor for a method."""
        values = [argument.ref if isinstance(argument, Pending) else argument for argument in arguments]
        ref = getattr(self.actors[rank], method).remote(*values)
        return Pending(ref, f"{self.role} worker {rank}: {method}", self.timeout)


def wait_until_built(crews: Sequence[RayCrew]) -> None:
    """Wait for every actor's constructor; raises what one of them raised."""
    ready = [crew.call(rank, "usage") for crew in crews for rank in range(crew.size)]
    for pending in ready:
        pending.result()


def stop(crews: Sequence[RayCrew]) -> None:
    """End every actor."""
    for crew in crews:
        for actor in crew.actors:
            ray.kill(actor)
