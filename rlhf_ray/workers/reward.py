"""Scores rollouts: the weighted sum of one or several rewards.

Left out on purpose: what becomes of an answer whose score is not finite, which is the algorithm's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_ray import console
from rlhf_ray.config import RewardSource
from rlhf_ray.config.secrets import redacted
from rlhf_ray.rewards import REWARDS, RewardContext
from rlhf_ray.rewards.base import response_texts
from rlhf_ray.shortage import named
from rlhf_ray.types import Rollout, Usage, select
from rlhf_ray.workers.meter import Meter, give_back


class RewardWorker:
    """Holds the reward model, or functions, or an HTTP client."""

    @named("reward", "start")
    def __init__(self, sources: Sequence[RewardSource], context: RewardContext, *, threads: int) -> None:
        self.terms = [
            (redacted(source.source), source.weight, REWARDS[source.kind](source, context)) for source in sources
        ]
        self.tokenizer, self.portion = context.tokenizer, context.portion
        self.meter = Meter(threads)
        self._told: set[str] = set()

    @torch.inference_mode()
    def score(self, rollout: Rollout) -> Tensor:
        """(B,) float32: the weighted sum of the terms; the first one that is not finite is said, with its answer."""
        with self.meter.busy(), named("reward", "judge", self.portion):
            self.meter.count(int(rollout.attention_mask.sum()))
            scores = torch.zeros(len(rollout))
            for name, weight, term in self.terms:
                found = term(rollout)
                if not bool(found.isfinite().all()) and name not in self._told:
                    self._tell(name, found, rollout)
                scores = scores + weight * found
            return scores

    def _tell(self, name: str, scores: Tensor, rollout: Rollout) -> None:
        """Say which answer a reward has no number for, once a reward."""
        self._told.add(name)
        bad = (~scores.isfinite()).nonzero()[0]
        (answer,) = response_texts(select(rollout, bad), self.tokenizer)
        console.say(
            f"reward {name} returned {scores[bad].item()} for the answer {answer!r}; nothing is learned from it"
        )

    def sleep(self) -> None:
        """Give back what is kept for the next call."""
        give_back()

    def usage(self) -> Usage:
        """Tokens scored and seconds spent since the last call."""
        return self.meter.take(self.portion.reduced)

    def __repr__(self) -> str:
        return f"RewardWorker({', '.join(name for name, _, _ in self.terms)})"
