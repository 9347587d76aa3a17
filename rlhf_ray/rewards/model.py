"""A trained reward model as a reward."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rlhf_ray.config import RewardSource
from rlhf_ray.models.adapter_folders import reward_model_over
from rlhf_ray.models.folders import model_folder
from rlhf_ray.models.hf_weights import load_reward_model, read_config
from rlhf_ray.models.scoring import autocast, in_micro_batches
from rlhf_ray.rewards.base import RewardContext, check_scores
from rlhf_ray.tokenizer import Tokenizer
from rlhf_ray.types import Rollout


def reward_model_folder(path: str | Path, tokenizer: Tokenizer, *, length: int, field: str) -> Path:
    """The folder of a reward model that can read the policy's rows of up to ``length`` tokens.

    Raises ValueError naming the field when there is no model, or its vocabulary or context does not fit.
    """
    folder = model_folder(path, field=field)
    if Tokenizer.load(folder).fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{field} = {path}: this reward model has another vocabulary than the policy; train one on the policy's own"
        )
    context = read_config(folder).n_positions
    if context < length:
        raise ValueError(
            f"{field} = {path}: this reward model reads {context} tokens and rows have up to {length}; lower "
            "generation.prompt_length or generation.response_length"
        )
    return folder


class ModelReward:
    """Scores read at the last real token, with the normalisation saved in the model's folder."""

    def __init__(self, source: RewardSource, context: RewardContext) -> None:
        folder = reward_model_folder(
            source.source, context.tokenizer, length=context.max_length, field="rewards.source"
        )
        self.source = source.source
        self.portion = context.portion
        self.dtype = context.dtype
        self.device = torch.device(context.device)
        if context.base and context.base.base.is_under(folder):
            self.model = reward_model_over(context.base.open(context.device), folder)
        else:
            self.model = load_reward_model(folder, device=context.device, frozen=context.frozen)
        self.model.eval().requires_grad_(False)

    def __call__(self, rollout: Rollout) -> Tensor:
        """(B,) float32."""
        return check_scores(in_micro_batches(rollout, self.portion, self._score), len(rollout), self.source)

    def _score(self, micro: Rollout) -> Tensor:
        with autocast(self.device, self.dtype):
            scores: Tensor = self.model(micro.tokens.to(self.device), micro.attention_mask.to(self.device))
        return scores.float()
