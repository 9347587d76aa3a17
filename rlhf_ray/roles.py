"""The four roles of reinforcement learning from human feedback, and the run that carries them along.

A role is called with shards and returns shards without waiting; ``gather`` is the only place where the driver waits.
Workers in this process and groups of Ray actors both fit these protocols, so an algorithm never knows which it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from rlhf_ray.types import (
    Evaluation,
    Experience,
    Handle,
    Judged,
    PromptBatch,
    Rollout,
    Shards,
    Usage,
    Weights,
    concat,
)


class Worked(Protocol):
    """Every role can say how much it has done."""

    def usage(self) -> Usage: ...  # of all workers, for calls that ended since it was last asked; waits for nobody

    def sleep(self) -> None: ...  # give back the memory that can be done without until the next call; waits for nobody


class Generator(Worked, Protocol):
    """Answers prompts with the newest policy that it was given before it was asked."""

    def generate(self, batch: PromptBatch, policy_version: int) -> Shards[Rollout]: ...

    def update_weights(self, weights: Handle[Weights]) -> None: ...


class Reward(Worked, Protocol):
    """Scores finished rows."""

    def score(self, rollouts: Shards[Rollout]) -> Shards[Tensor]: ...  # (b,) each


class Reference(Worked, Protocol):
    """The frozen policy that the KL penalty is measured against."""

    def logprobs(self, rollouts: Shards[Rollout]) -> Shards[Tensor]: ...  # (b, t) each


class Learner(Worked, Protocol):
    """Owns policy, critic and optimiser."""

    def evaluate(self, rollouts: Shards[Rollout]) -> Shards[Evaluation]: ...

    def update(self, experience: Experience) -> Handle[dict[str, float]]: ...

    def weights(self, policy_version: int) -> Handle[Weights]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Everybody whom an algorithm needs."""

    generator: Generator
    reward: Reward
    reference: Reference
    learner: Learner


class Stateful(Protocol):
    """Something small that a resumed run must remember."""

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: Mapping[str, float]) -> None: ...


S = TypeVar("S", bound=Stateful)
J = TypeVar("J")


class Run(Protocol):
    """What an algorithm asks of its run: batches, timers, memory across a restart, and the end of a step."""

    first_step: int
    """The step to begin with, which is also the version of the policy that begins: 0, or that of a checkpoint."""

    @property
    def rollbacks(self) -> int: ...  # how often it has diverged and gone back

    def track(self, name: str, state: S) -> S: ...  # restored from the run's checkpoint now, saved with the next

    def rollouts(
        self, generator: Generator, judge: Callable[[Shards[Rollout]], J]
    ) -> Iterator[tuple[int, Shards[Rollout], J]]: ...  # judged the moment they are asked for, which may be steps ahead

    def time(self, phase: str) -> AbstractContextManager[None]: ...

    def end_step(self, step: int, judged: Judged, experience: Experience, metrics: dict[str, float]) -> None: ...


def gather(*batches: Shards[Any]) -> Any:
    """Wait for every shard and join the rows of each batch; one batch alone comes back bare.

    (b, t) fields are padded on the right to one width over all batches, so that tensors of different roles align.
    Raises what the shards' computations raised.
    """
    joined = [concat(shards.handles[0].results(shards.handles)) for shards in batches]
    return joined[0] if len(joined) == 1 else tuple(joined)
