"""Passing a rollout through a model in micro-batches, without gradients.

Reference and learner go through the same function, so that equal weights give equal log-probabilities and the first
KL is zero.  A micro-batch is cut to its longest row; rows are right-padded, so no value changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.models.gpt2 import GPT2
from rlhf_ray.ops.logprobs import token_logprobs
from rlhf_ray.types import Rollout, concat, select, trim


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Autocast to ``dtype``; nothing at all for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def micro_batches(rollout: Rollout, size: int) -> Iterator[Rollout]:
    """Consecutive rows, ``size`` at a time, each block without needless padding."""
    for start in range(0, len(rollout), size):
        micro: Rollout = select(rollout, slice(start, start + size))
        yield trim(micro, micro.width)


def in_micro_batches(rollout: Rollout, size: int, score: Callable[[Rollout], Tensor]) -> Tensor:
    """Apply ``score`` to each micro-batch and join the rows: (B,), or (B, T) at the rollout's own width."""
    parts = [score(micro).cpu() for micro in micro_batches(rollout, size)]
    joined: Tensor = concat(parts, width=rollout.tokens.shape[1])
    return joined


def policy_logprobs(
    policy: GPT2, micro: Rollout, *, temperature: float, dtype: torch.dtype, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (b, t) of a micro-batch's response tokens and, if asked, entropies (b, t); 0 elsewhere.

    On the policy's device, in float32, with gradients where they are enabled.
    """
    device = policy.wte.weight.device
    tokens, mask = micro.tokens.to(device), micro.response_mask.to(device)
    with autocast(device, dtype):
        hidden = policy(tokens, attention_mask=micro.attention_mask.to(device))  # (b, t, D)
    return token_logprobs(hidden, policy.wte.weight, tokens, mask, temperature=temperature, with_entropy=with_entropy)
