"""The frozen policy that the KL penalty is measured against."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rlhf_ray.models.hf_weights import load_policy
from rlhf_ray.models.scoring import in_micro_batches, policy_logprobs
from rlhf_ray.types import Rollout, Usage
from rlhf_ray.workers.meter import Meter, give_back


class ReferenceWorker:
    """Log-probabilities of rollouts under the SFT policy."""

    def __init__(
        self,
        folder: Path,
        *,
        temperature: float,
        micro_batch_size: int,
        device: str,
        dtype: torch.dtype,
        threads: int,
        micro_batch_tokens: int = 0,
        frozen: str = "float32",
    ) -> None:
        """``frozen`` is how the weights are kept."""
        self.policy = load_policy(folder, device=device, frozen=frozen).eval().requires_grad_(False)
        self.temperature = temperature
        self.micro_batch_size = micro_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.dtype = dtype
        self.meter = Meter(threads)

    @torch.inference_mode()
    def logprobs(self, rollout: Rollout) -> Tensor:
        """(B, T) float32: log-probabilities of the response tokens, 0 elsewhere."""
        with self.meter.busy():
            self.meter.count(int(rollout.attention_mask.sum()))
            return in_micro_batches(rollout, self.micro_batch_size, self._score, tokens=self.micro_batch_tokens)

    def _score(self, micro: Rollout) -> Tensor:
        return policy_logprobs(self.policy, micro, temperature=self.temperature, dtype=self.dtype)

    def sleep(self) -> None:
        """Give back what is kept for the next call."""
        give_back()

    def usage(self) -> Usage:
        """Tokens scored and seconds spent since the last call."""
        return self.meter.take()

    def __repr__(self) -> str:
        return f"ReferenceWorker({self.policy.wte.weight.device})"
