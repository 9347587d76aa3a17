"""The four roles over a crew of workers: how a call is cut into shards, and what a worker must hold to answer.

A crew is several equal workers, whichever of which carries out a call: Ray actors (``runtime/crew.py``), or one
worker in this process (``LocalCrew``, for debugging and for the smallest boxes).  Shards are cut by ``shard_size``
alone, so the rows of a step, and in float32 its metrics, are the same for any number of workers.

A handle that is passed on is never waited for here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rlhf_ray.profiling import span
from rlhf_ray.types import (
    Done,
    Evaluation,
    Experience,
    Handle,
    PromptBatch,
    Rollout,
    Shards,
    Usage,
    Weights,
)


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What a worker must hold before it carries out a call: ``method(value)``, once until it is given another."""

    method: str
    value: Handle[Any]


class Crew(Protocol):
    """Equal workers of one role."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def call(self, method: str, *arguments: Any, given: Given | None = None, joined: bool = False) -> Handle[Any]:
        """Ask whoever is free first, without waiting; handles among the arguments arrive as their values.

        Calls begin in the order in which their arguments are there.  Those that are ``joined`` and ready together may
        be handed to one worker together, which carries out each by itself.
        """
        ...

    def aside(self, method: str, *arguments: Any) -> Any:
        """Have the only worker do something beside its calls, which go on, and wait for it."""
        ...

    def tell(self, method: str) -> None:
        """Have every worker that is there do something after what it is at; nobody waits or hears how it went."""
        ...

    def usage(self) -> Usage:
        """Work of all calls that have ended since this was last asked; waits for nobody."""
        ...


class LocalCrew:
    """One worker in this process; a call is carried out at once."""

    size = 1

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self._holds: Given | None = None

    def call(self, method: str, *arguments: Any, given: Given | None = None, joined: bool = False) -> Done[Any]:
        """Carry out the method."""
        if given is not None and given is not self._holds:
            self._carry_out(given.method, given.value.result())
            self._holds = given
        values = [argument.value if isinstance(argument, Done) else argument for argument in arguments]
        return Done(self._carry_out(method, *values))

    def _carry_out(self, method: str, *arguments: Any) -> Any:
        with span(f"{type(self.worker).__name__}.{method}"):
            return getattr(self.worker, method)(*arguments)

    def aside(self, method: str, *arguments: Any) -> Any:
        """Carry out the method in the calling thread."""
        return getattr(self.worker, method)(*arguments)

    def tell(self, method: str) -> None:
        """Carry out the method."""
        getattr(self.worker, method)()

    def usage(self) -> Usage:
        """What the worker has done since it was last asked."""
        used: Usage = self.worker.usage()
        return used


class Group:
    """What every role does with its crew."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew

    def _map(self, method: str, shards: Shards[Any]) -> Shards[Any]:
        """One call a shard, joined: opinions on shards that are ready together are had together."""
        return Shards(tuple(self.crew.call(method, handle, joined=True) for handle in shards.handles))

    def usage(self) -> Usage:
        """Work of all workers since the last call."""
        return self.crew.usage()

    def sleep(self) -> None:
        """Have every worker give back the memory that it can do without until the next call."""
        self.crew.tell("sleep")


class GeneratorGroup(Group):
    """Rollout workers."""

    def __init__(self, crew: Crew, *, shard_size: int) -> None:
        super().__init__(crew)
        self.shard_size = shard_size
        self._weights: Given | None = None

    def generate(self, batch: PromptBatch, policy_version: int) -> Shards[Rollout]:
        """Rows in shards of ``shard_size``, each sampled with the weights that are the newest now."""
        calls = [
            self.crew.call("generate", batch.rows(start, start + self.shard_size), policy_version, given=self._weights)
            for start in range(0, len(batch), self.shard_size)
        ]
        return Shards(tuple(calls))

    def update_weights(self, weights: Handle[Weights]) -> None:
        """Have every worker take these weights over before the first shard that it is asked for from now on.

        A shard that was asked for before keeps its weights, even if it has not begun.
        """
        self._weights = Given("update_weights", weights)


class RewardGroup(Group):
    """Reward workers."""

    def score(self, rollouts: Shards[Rollout]) -> Shards[Tensor]:
        """(b,) scores of each shard."""
        return self._map("score", rollouts)


class ReferenceGroup(Group):
    """Reference workers."""

    def logprobs(self, rollouts: Shards[Rollout]) -> Shards[Tensor]:
        """(b, t) log-probabilities of each shard."""
        return self._map("logprobs", rollouts)


class BaseReferenceGroup(ReferenceGroup):
    """The learner's policy without its adapters, which needs no worker of its own."""

    def usage(self) -> Usage:
        """None: the work is the learner's, which counts it."""
        return Usage()


class LearnerGroup(Group):
    """The learner: one worker, or several ranks that are given every call together and answer as one."""

    def __init__(self, crew: Crew, *, publish: Callable[[int], Handle[Weights]] | None = None) -> None:
        """``publish`` asks for a version's weights where workers have to be there for that."""
        super().__init__(crew)
        self._publish = publish

    def evaluate(self, rollouts: Shards[Rollout]) -> Shards[Evaluation]:
        """Old log-probabilities, entropies and values of each shard."""
        return self._map("evaluate", rollouts)

    def update(self, experience: Experience) -> Handle[dict[str, float]]:
        """Learn from one batch; the metrics of it."""
        return self.crew.call("update", experience)

    def weights(self, policy_version: int) -> Handle[Weights]:
        """The policy's weights."""
        return self._publish(policy_version) if self._publish else self.crew.call("weights", policy_version)

    def snapshot(self) -> Handle[None]:
        """Have the learner keep a copy of its state as it is now, for `write`."""
        return self.crew.call("snapshot")

    def write(self, folder: Path) -> None:
        """Write the newest snapshot into a checkpoint's folder, and wait for it; learning goes on meanwhile."""
        self.crew.aside("write", folder)

    def load(self, folder: Path) -> None:
        """Take over a checkpoint, and wait for it."""
        self.crew.call("load", folder).result()
