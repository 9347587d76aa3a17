"""Log-probabilities of given tokens, without ever holding the logits of a whole batch.

Only the positions that a mask asks for get logits, a chunk at a time; a chunk's logits are recomputed in the
backward pass.  The shift between a hidden state and the token that it predicts happens here and nowhere
else.

Left out on purpose: a second derivative, and sharing the vocabulary among devices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_BUDGET = 2**26
"""Logits of one chunk when no chunk size is given: 256 MiB in float32."""


def head_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Float32 logits (..., V) of hidden (..., D) and head_weight (V, D), autocast or not."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), head_weight.float())


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability, in nats, of each masked token given those before it, and the entropy of its draw.

    hidden (B, T, D), head_weight (V, D), tokens (B, T) int64, mask (B, T) bool -> logprobs (B, T) float32
    and entropy (B, T) float32 or None.  Entry [b, t] is read from hidden[b, t-1]; it is 0 where the mask is
    False and at t = 0, which nothing precedes.  Hidden states and tokens that the mask leaves out are never
    read.  ``chunk_size`` counts positions.  ValueError when ``temperature`` or ``chunk_size`` is not
    positive.
    """
    B, T, _ = hidden.shape
    assert tokens.shape == mask.shape == (B, T), f"tokens {tokens.shape}, mask {mask.shape}, hidden {hidden.shape}"
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; a log-probability needs one above 0")
    if chunk_size is None:
        chunk_size = max(256, LOGITS_BUDGET // len(head_weight))
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    rows, before = mask[:, 1:].nonzero(as_tuple=True)  # (N,) each: the state that predicts token before + 1
    states, targets = hidden[rows, before], tokens[rows, before + 1]  # (N, D), (N,)
    parts = []
    for start in range(0, max(len(rows), 1), chunk_size):
        args = (states[start : start + chunk_size], head_weight, targets[start : start + chunk_size])
        # The backward pass takes the last chunk first: recomputing it would save no memory.
        if torch.is_grad_enabled() and start + chunk_size < len(rows):
            parts.append(checkpoint(_chunk, *args, temperature, with_entropy, use_reentrant=False))
        else:
            parts.append(_chunk(*args, temperature, with_entropy))
    place = (rows, before + 1)
    zeros = torch.zeros(B, T, device=hidden.device, dtype=torch.float32)
    logprobs = zeros.index_put(place, torch.cat([part[0] for part in parts]))
    if not with_entropy:
        return logprobs, None
    return logprobs, zeros.index_put(place, torch.cat([part[1] for part in parts]))


def _chunk(
    states: Tensor, head_weight: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropies (n,) of states (n, D) and targets (n,)."""
    logits = head_logits(states, head_weight) / temperature  # (n, V)
    if not with_entropy:
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1), None
    logp = torch.log_softmax(logits, dim=1)  # (n, V)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)
