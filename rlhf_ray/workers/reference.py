"""The frozen policy that the KL penalty is measured against."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rlhf_ray.models.hf_weights import load_policy
from rlhf_ray.models.scoring import in_micro_batches, policy_logprobs
from rlhf_ray.shortage import Portion, named
from rlhf_ray.types import Rollout, Usage
from rlhf_ray.workers.meter import Meter, give_back


class ReferenceWorker:
    """Log-probabilities of rollouts under the SFT policy."""

    @named("reference", "start")
    def __init__(
        self,
        folder: Path,
        *,
        temperature: float,
        portion: Portion,
        device: str,
        dtype: torch.dtype,
        threads: int,
        frozen: str = "float32",
    ) -> None:
        """``portion`` is a forward pass's, ``frozen`` how the weights are kept."""
        self.policy = load_policy(folder, device=device, frozen=frozen).eval().requires_grad_(False)
        self.temperature = temperature
        self.portion = portion
        self.dtype = dtype
        self.meter = Meter(threads)

    @torch.inference_mode()
    def logprobs(self, rollout: Rollout) -> Tensor:
        """(B, T) float32: log-probabilities of the response tokens, 0 elsewhere."""
        with self.meter.busy(), named("reference", "judge", self.portion):
            self.meter.count(int(rollout.attention_mask.sum()))
            return in_micro_batches(rollout, self.portion, self._score)

    def _score(self, micro: Rollout) -> Tensor:
        return policy_logprobs(self.policy, micro, temperature=self.temperature, dtype=self.dtype)

    def sleep(self) -> None:
        """Give back what is kept for the next call."""
        give_back()

    def usage(self) -> Usage:
        """Tokens scored and seconds spent since the last call."""
        return self.meter.take(self.portion.reduced)

    def __repr__(self) -> str:
        return f"ReferenceWorker({self.policy.wte.weight.device})"
