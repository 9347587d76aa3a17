"""The four roles over a crew of workers: how a call is cut into shards and who gets which.

A crew is several equal workers that can be asked for a method by number: Ray actors (``runtime/crew.py``), or one
worker in this process (``LocalCrew``, for debugging and for the smallest boxes).  Shards are cut by ``shard_size``
alone, so the rows of a step, and in float32 its metrics, are the same for any number of workers.

A handle that is passed on is never waited for here.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

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


class Crew(Protocol):
    """Equal workers of one role."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def call(self, rank: int, method: str, *arguments: Any) -> Handle[Any]:
        """Ask one worker for a method, without waiting; handles among the arguments arrive as their values."""
        ...


class LocalCrew:
    """One worker in this process; a call is carried out at once."""

    size = 1

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def call(self, rank: int, method: str, *arguments: Any) -> Done[Any]:
        """Carry out the method."""
        assert rank == 0
        values = [argument.value if isinstance(argument, Done) else argument for argument in arguments]
        return Done(getattr(self.worker, method)(*values))


class Group:
    """What every role does with its crew."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew

    def _all(self, method: str, *arguments: Any) -> list[Handle[Any]]:
        return [self.crew.call(rank, method, *arguments) for rank in range(self.crew.size)]

    def _map(self, method: str, shards: Shards[Any]) -> Shards[Any]:
        """One call a shard, in turn over the workers."""
        return Shards(
            tuple(self.crew.call(i % self.crew.size, method, handle) for i, handle in enumerate(shards.handles))
        )

    def usage(self) -> Usage:
        """Work of all workers since the last call."""
        return reduce(add, [handle.result() for handle in self._all("usage")])


class GeneratorGroup(Group):
    """Rollout workers."""

    def __init__(self, crew: Crew, *, shard_size: int) -> None:
        super().__init__(crew)
        self.shard_size = shard_size
        self._updates: list[Handle[None]] = []

    def generate(self, batch: PromptBatch, policy_version: int) -> Shards[Rollout]:
        """Rows in shards of ``shard_size``."""
        calls = [
            self.crew.call(
                i % self.crew.size,
                "generate",
                batch,
                policy_version,
                start,
                min(start + self.shard_size, len(batch)),
            )
            for i, start in enumerate(range(0, len(batch), self.shard_size))
        ]
        return Shards(tuple(calls))

    def update_weights(self, weights: Handle[Weights]) -> None:
        """Hand every worker the same weights; what the update before this one raised is raised here."""
        for handle in self._updates:
            handle.result()
        self._updates = self._all("update_weights", weights)


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


class LearnerGroup(Group):
    """The learner: one worker."""

    def evaluate(self, rollouts: Shards[Rollout]) -> Shards[Evaluation]:
        """Old log-probabilities, entropies and values of each shard."""
        return self._map("evaluate", rollouts)

    def update(self, experience: Experience) -> Handle[dict[str, float]]:
        """Learn from one batch; the metrics of it."""
        return self.crew.call(0, "update", experience)

    def weights(self, policy_version: int) -> Handle[Weights]:
        """The policy's weights."""
        return self.crew.call(0, "weights", policy_version)

    def save(self, folder: Path) -> None:
        """Write the learner's part of a checkpoint, and wait for it."""
        self.crew.call(0, "save", folder).result()

    def load(self, folder: Path) -> None:
        """Take over a checkpoint, and wait for it."""
        self.crew.call(0, "load", folder).result()
