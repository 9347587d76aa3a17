"""Workers without models: they sleep as long as real ones would compute, and answer in the shapes of real ones.

Left out on purpose: the bytes of the weights, which the driver never holds; saving, which is the learner's own work.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.types import Evaluation, Experience, PromptBatch, Rollout, Usage, Weights
from rlhf_ray.workers.meter import Meter


def importable() -> None:
    """Let the actors of a cluster that this process starts find this module."""
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))


class Stub:
    """A worker of any role, that takes ``row_seconds`` a row, and twice that to learn from it."""

    def __init__(self, *, prompt: int, new: int, row_seconds: float) -> None:
        self.prompt, self.new, self.row_seconds = prompt, new, row_seconds
        self.meter = Meter(1)

    def _work(self, rows: int) -> None:
        with self.meter.busy():
            time.sleep(rows * self.row_seconds)
        self.meter.count(rows * self.new)

    def update_weights(self, weights: Weights) -> None:
        self.policy_version = weights.policy_version

    def generate(self, batch: PromptBatch, policy_version: int) -> Rollout:
        assert policy_version == self.policy_version
        shape = (len(batch), self.prompt + self.new)
        self._work(len(batch))
        return Rollout(
            tokens=torch.zeros(shape, dtype=torch.int64),
            attention_mask=torch.ones(shape, dtype=torch.bool),
            response_mask=(torch.arange(shape[1]) >= self.prompt).repeat(shape[0], 1),
            rollout_logprobs=torch.zeros(shape),
            prompt_ids=torch.from_numpy(batch.prompt_ids.copy()),
            group_ids=torch.from_numpy(batch.group_ids.copy()),
            policy_version=torch.full(shape[:1], policy_version),
            finished=torch.zeros(shape[0], dtype=torch.bool),
        )

    def score(self, rollout: Rollout) -> Tensor:
        self._work(len(rollout))
        return torch.arange(len(rollout), dtype=torch.float32)

    def logprobs(self, rollout: Rollout) -> Tensor:
        self._work(len(rollout))
        return torch.zeros(rollout.tokens.shape)

    def evaluate(self, rollout: Rollout) -> Evaluation:
        self._work(len(rollout))
        zeros = torch.zeros(rollout.tokens.shape)
        return Evaluation(old_logprobs=zeros, entropy=zeros.clone(), values=zeros.clone())

    def update(self, experience: Experience) -> dict[str, float]:
        self._work(2 * len(experience))
        return {"update/skipped": 0.0}

    def weights(self, policy_version: int) -> Weights:
        return Weights(buffer=np.zeros(1, np.float32), policy_version=policy_version, digest="")

    def snapshot(self) -> None: ...

    def write(self, folder: Path) -> None: ...

    def usage(self) -> Usage:
        return self.meter.take()
