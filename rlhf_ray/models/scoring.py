"""Passing a rollout through a model in micro-batches.

Reference and learner go through the same functions, so that equal weights give equal log-probabilities and the first
KL is zero.  Only real tokens are computed on, and hidden states exist only where something is read from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.models.gpt2 import GPT2
from rlhf_ray.models.layout import Layout
from rlhf_ray.ops.logprobs import before, token_logprobs
from rlhf_ray.shortage import Portion
from rlhf_ray.types import Rollout, columns, concat, select


def compute_type(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """``dtype``, but float32 on a CPU that has to emulate bfloat16, which is slower there than float32."""
    if torch.device(device).type != "cpu" or dtype == torch.float32:
        return dtype
    able = torch.cpu.get_capabilities()
    return dtype if any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Autocast to ``dtype``; nothing at all for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def row_ranges(lengths: Tensor, size: int, tokens: int = 0) -> Iterator[slice]:
    """Consecutive rows of lengths (B,), ``size`` at a time; given ``tokens``, as many as hold no more, at least one."""
    start, held = 0, 0
    for row, length in enumerate(lengths.tolist()):
        held += length
        if row > start and (held > tokens if tokens else row - start == size):
            yield slice(start, row)
            start, held = row, length
    yield slice(start, len(lengths))


def micro_batches(rollout: Rollout, size: int, tokens: int = 0) -> Iterator[Rollout]:
    """Consecutive rows, cut by ``row_ranges``, each block without needless columns."""
    for rows in row_ranges(rollout.attention_mask.sum(1), size, tokens):
        micro: Rollout = select(rollout, rows)
        yield columns(micro, slice(micro.width))


def in_micro_batches(rollout: Rollout, portion: Portion, score: Callable[[Rollout], Tensor]) -> Tensor:
    """Apply ``score`` to each micro-batch and join the rows: (B,), or (B, T) at the rollout's own width."""

    def scores() -> list[Tensor]:
        return [score(micro).cpu() for micro in micro_batches(rollout, portion.rows, portion.tokens)]

    parts = portion.attempt(scores, lambda: rollout.attention_mask.sum(1))
    joined: Tensor = concat(parts, width=rollout.tokens.shape[1])
    return joined


def response_layout(micro: Rollout, device: torch.device) -> Layout:
    """The layout of a micro-batch whose hidden states are read before its response tokens."""
    return Layout.of(micro.attention_mask, read=before(micro.response_mask), device=device)


def response_logprobs(
    policy: GPT2, states: Tensor, micro: Rollout, *, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (b, t) of the response tokens and, if asked, entropies (b, t), from the policy's ``states``
    (n, D) in a ``response_layout``.
    """
    return token_logprobs(
        states,
        policy.wte.weight,
        micro.tokens,
        micro.response_mask,
        temperature=temperature,
        with_entropy=with_entropy,
    )


def policy_logprobs(policy: GPT2, micro: Rollout, *, temperature: float, dtype: torch.dtype) -> Tensor:
    """Log-probabilities (b, t) float32 of a micro-batch's response tokens, 0 elsewhere, on the policy's device."""
    device = policy.wte.weight.device
    with autocast(device, dtype):
        states = policy.states(micro.tokens.to(device), response_layout(micro, device))  # (n, D)
        return response_logprobs(policy, states, micro, temperature=temperature, with_entropy=False)[0]
