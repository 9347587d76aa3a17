"""What a reward is: something that scores finished rows.

A row is scored with everything known about it: its tokens, its response as text, and the prompt row it answers with
all the fields that the prompt file gave it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlhf_ray.data.prompt_set import PromptSet
from rlhf_ray.models.shared_base import FrozenBase
from rlhf_ray.shortage import Portion
from rlhf_ray.tokenizer import Tokenizer
from rlhf_ray.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardContext:
    """What a reward is built with."""

    tokenizer: Tokenizer
    prompts: PromptSet
    device: str
    dtype: torch.dtype
    portion: Portion
    """Of a reward model's forward pass."""
    max_length: int
    """Tokens of the longest row, prompt and response together."""
    frozen: str = "float32"
    """How a reward model's weights are kept."""
    base: FrozenBase | None = None
    """The run's policy below its adapters, which a reward model that is adapters over it shares."""


class RewardFunction(Protocol):
    """One term of the reward."""

    def __call__(self, rollout: Rollout) -> Tensor:
        """(B,) float32: one score a row, not yet weighted."""
        ...


def response_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """The responses as text, special tokens left out."""
    return [
        tokenizer.decode(tokens[mask].tolist())
        for tokens, mask in zip(rollout.tokens, rollout.response_mask, strict=True)
    ]


def check_scores(scores: Tensor, rows: int, source: str) -> Tensor:
    """The scores as (B,) float32, finite or not; ValueError when their number is wrong."""
    if scores.shape != (rows,):
        raise ValueError(f"reward {source} returned {tuple(scores.shape)} scores for {rows} rows")
    return scores.float()
