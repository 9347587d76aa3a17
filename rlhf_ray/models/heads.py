"""Scalar heads on a GPT-2 trunk: the reward model, the critic, and a value head that shares the policy's
trunk.

A reward model is read at the last real token.  Its normaliser (gain and bias, set after training so that the
SFT policy's samples have mean 0 and deviation 1; Ziegler et al. 2019) applies wherever the model is read,
also where it has become a critic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rlhf_ray.models.gpt2 import GPT2
from rlhf_ray.models.layout import Layout
from rlhf_ray.ops.logprobs import head_logits


class ValueModel(nn.Module):
    """A trunk and one number per token: a reward model read at the end, or a critic read everywhere."""

    reward_gain: Tensor
    reward_bias: Tensor

    def __init__(self, trunk: GPT2) -> None:
        """Start the score at N(0, 1/sqrt(d + 1)) with bias 0, as N+ (Huang et al. 2024) does."""
        super().__init__()
        like = trunk.wte.weight
        width = trunk.config.n_embd
        self.trunk = trunk
        self.score = nn.Linear(width, 1, device=like.device, dtype=like.dtype)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(width + 1))
        nn.init.zeros_(self.score.bias)
        self.register_buffer("reward_gain", torch.ones((), device=like.device, dtype=torch.float32))
        self.register_buffer("reward_bias", torch.zeros((), device=like.device, dtype=torch.float32))

    def set_normaliser(self, *, mean: float, std: float) -> None:
        """Compose the normaliser with one that maps the given mean and deviation, as read now, to 0 and 1.

        ValueError when the deviation is not positive and finite.
        """
        if not (std > 0 and math.isfinite(std) and math.isfinite(mean)):
            raise ValueError(f"reward mean {mean}, std {std}: the scores must be finite and differ to be normalised")
        self.reward_bias.copy_((self.reward_bias - mean) / std)
        self.reward_gain.copy_(self.reward_gain / std)

    def values(self, tokens: Tensor, layout: Layout) -> Tensor:
        """(n,) float32: the numbers read *at* the places of tokens (B, T) that the layout asks for.

        What is read at a token is the value *before* the next one is emitted.
        """
        return self._read(self.trunk.states(tokens, layout))

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """(B,) float32: the number read at the last real token of each row, wherever its padding is."""
        real = attention_mask.cpu() != 0  # (B, T)
        last = torch.where(real, torch.arange(tokens.shape[1]), -1).amax(1, keepdim=True)  # (B, 1)
        read = torch.arange(tokens.shape[1]) == last
        return self.values(tokens, Layout.of(real, read=read, device=tokens.device))

    def _read(self, hidden: Tensor) -> Tensor:
        score = head_logits(hidden, self.score.weight)[..., 0] + self.score.bias.float()
        return self.reward_gain * score + self.reward_bias


class SharedValueHead(nn.Linear):
    """A value head on the policy's own trunk, started at zero as Ziegler et al. (2019) start it."""

    def __init__(self, trunk: GPT2) -> None:
        super().__init__(trunk.config.n_embd, 1, device=trunk.wte.weight.device, dtype=trunk.wte.weight.dtype)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(...,) float32 values read at each of the hidden states (..., D)."""
        return head_logits(hidden, self.weight)[..., 0] + self.bias.float()
