"""Scores rollouts: the weighted sum of one or several rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_ray.config import RewardSource
from rlhf_ray.config.secrets import redacted
from rlhf_ray.rewards import REWARDS, RewardContext
from rlhf_ray.types import Rollout, Usage
from rlhf_ray.workers.meter import Meter, give_back


class RewardWorker:
    """Holds the reward model, or functions, or an HTTP client."""

    def __init__(self, sources: Sequence[RewardSource], context: RewardContext, *, threads: int) -> None:
        self.terms = [(source.weight, REWARDS[source.kind](source, context)) for source in sources]
        self.names = ", ".join(redacted(source.source) for source in sources)
        self.meter = Meter(threads)

    @torch.inference_mode()
    def score(self, rollout: Rollout) -> Tensor:
        """(B,) float32: the weighted sum of the terms."""
        with self.meter.busy():
            self.meter.count(int(rollout.attention_mask.sum()))
            scores = torch.zeros(len(rollout))
            for weight, term in self.terms:
                scores = scores + weight * term(rollout)
            return scores

    def sleep(self) -> None:
        """Give back what is kept for the next call."""
        give_back()

    def usage(self) -> Usage:
        """Tokens scored and seconds spent since the last call."""
        return self.meter.take()

    def __repr__(self) -> str:
        return f"RewardWorker({self.names})"
