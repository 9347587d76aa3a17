"""A trained reward model as a reward."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.config import RewardSource
from rlhf_ray.models.folders import model_folder
from rlhf_ray.models.hf_weights import load_reward_model
from rlhf_ray.rewards.base import RewardContext, check_scores
from rlhf_ray.tokenizer import Tokenizer
from rlhf_ray.types import Rollout
from rlhf_ray.workers.scoring import autocast, in_micro_batches


class ModelReward:
    """Scores read at the last real token, with the normalisation saved in the model's folder."""

    def __init__(self, source: RewardSource, context: RewardContext) -> None:
        folder = model_folder(source.source, field="rewards.source")
        if Tokenizer.load(folder).fingerprint != context.tokenizer.fingerprint:
            raise ValueError(
                f"rewards.source = {source.source}: this reward model has another vocabulary than the policy; "
                "train one on the policy's own"
            )
        self.source = source.source
        self.micro_batch_size = context.micro_batch_size
        self.dtype = context.dtype
        self.device = torch.device(context.device)
        self.model = load_reward_model(folder, device=context.device, dtype=torch.float32)
        self.model.eval().requires_grad_(False)

    def __call__(self, rollout: Rollout) -> Tensor:
        """(B,) float32."""
        return check_scores(in_micro_batches(rollout, self.micro_batch_size, self._score), len(rollout), self.source)

    def _score(self, micro: Rollout) -> Tensor:
        with autocast(self.device, self.dtype):
            scores: Tensor = self.model(micro.tokens.to(self.device), micro.attention_mask.to(self.device))
        return scores.float()
