"""The handle of a call that a crew has been asked for, and what its arguments are to Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from rlhf_ray.runtime.actor import wait_for
from rlhf_ray.runtime.dispatch import Job
from rlhf_ray.types import Done


class ComputesAgain(Protocol):
    """Whoever can carry a job out once more."""

    timeout: float
    """Seconds that a value may be on its way."""

    def compute_again(self, job: Job, ref: Any) -> None: ...  # unless it has another value than ``ref`` already


@dataclass(frozen=True, slots=True)
class Pending:
    """A value that is under way."""

    job: Job
    crew: ComputesAgain

    def result(self) -> Any:
        """Wait for the value; raises what the call raised.

        The wait has no limit of its own: a worker that takes too long is replaced, as often as the run stands it.
        """
        while True:
            ref = self.job.ended.result()
            try:
                return wait_for(ref, f"{self.job.what}: its value", self.crew.timeout)
            except ObjectLostError:
                if not self.job.may_try_again():
                    raise
                self.crew.compute_again(self.job, ref)

    @staticmethod
    def results(handles: Sequence[Pending]) -> list[Any]:
        """Wait for several values, and take them all from Ray at once, which costs less than one by one."""
        refs = [handle.job.ended.result() for handle in handles]
        try:
            values: list[Any] = ray.get(refs, timeout=handles[0].crew.timeout)
        except (ObjectLostError, GetTimeoutError):
            return [handle.result() for handle in handles]  # finds out which
        return values


def pending(job: Job) -> Iterator[Pending]:
    """What a job is handed that may be under way."""
    handed = [*job.arguments, job.given.value] if job.given else job.arguments
    return (value for value in handed if isinstance(value, Pending))


def error_of_arguments(job: Job) -> BaseException | None:
    """What one of a job's arguments, which have all ended, has raised."""
    return next((error for handle in pending(job) if (error := handle.job.ended.exception())), None)


def compute_argument_again(job: Job, lost: str) -> None:
    """Have the argument computed again whose value, an object of this hexadecimal name, was lost."""
    for handle in pending(job):
        if handle.job.is_at(lost):
            handle.crew.compute_again(handle.job, handle.job.ended.result())


def reference(argument: Any) -> Any:
    """A handle as something that Ray hands over by reference, a value as itself; raises what its call raised."""
    if isinstance(argument, Pending):
        return argument.job.ended.result()
    return argument.value if isinstance(argument, Done) else argument
