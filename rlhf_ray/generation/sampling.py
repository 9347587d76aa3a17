"""How a token is chosen: one uniform number per token, turned into a token by inverse CDF.

Every row owns a counter-based stream (Philox; Salmon et al. 2011) keyed by seed, step and row, so which
worker, batch or retry produced a row changes nothing.

Left out on purpose: repetition penalties and beams, which no training objective here accounts for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
"""Columns whose sum is one entry of the coarse CDF."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn."""

    max_new_tokens: int
    """Longest response in tokens, EOS included."""
    min_new_tokens: int = 0
    """EOS is not drawn before the response has this many tokens, EOS included."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together reach this probability; 1 for all."""
    min_p: float = 0.0
    """Draw among tokens at least this many times as likely as the likeliest; 0 for all."""
    stop_ids: tuple[int, ...] = ()
    """Further tokens that end a response as EOS does."""
    stop: tuple[str, ...] = ()
    """Strings that end a response by the token that completes one."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}; it must be between 0 and max_new_tokens "
                f"({self.max_new_tokens})"
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be finite and at least 0")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 0 (0 = off)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (1 = off)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be between 0 and 1 (0 = off)")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which would end every response at once; remove it")

    @property
    def truncated(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def row_uniforms(seed: int, step: int, row: int, length: int) -> np.ndarray:
    """The row's own stream: (length,) float64 in [0, 1), one per token; it does not depend on how long it is.

    ValueError when a key is negative or needs more than 64 bits.
    """
    for name, value in (("seed", seed), ("step", step), ("row", row)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} is {value}; it must be at least 0 and below 2**64")
    key = np.array([seed, step], dtype=np.uint64)
    counter = np.array([0, 0, 0, row], dtype=np.uint64)  # a stream runs along the low words
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(length)


class Drawn(NamedTuple):
    """One token per row."""

    tokens: Tensor
    """(B,) int64."""
    logprobs: Tensor
    """(B,) float32: in the full distribution at the temperature (at 1 when that is 0), whatever was left out."""
    log_kept: Tensor
    """(B,) float32: log of the full distribution's mass that the token was drawn from; 0 when that is all of it."""


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling, *, banned: Tensor | None = None) -> Drawn:
    """Draw one token per row.

    logits (B, V) float32, uniforms (B,) float64 in [0, 1), ``banned`` (B, V) bool, True on tokens not to
    draw.  A drawn token always has probability above 0.
    """
    scaled = logits if sampling.temperature in (0.0, 1.0) else logits / sampling.temperature  # (B, V)
    allowed = scaled if banned is None else scaled.masked_fill(banned, float("-inf"))
    if sampling.truncated and sampling.temperature > 0:
        allowed = _truncate(allowed, sampling)
    if sampling.temperature == 0:
        tokens = allowed.argmax(1)
    else:
        p = allowed.softmax(1)  # (B, V)
        tokens = _inverse_cdf(p, uniforms)
        if allowed is scaled:
            # In float64, because float32's last bit depends on a row's place in the batch.
            logprobs = p.gather(1, tokens[:, None])[:, 0].double().log().float()
            return Drawn(tokens, logprobs, torch.zeros_like(logprobs))
    mass = scaled.logsumexp(1)
    return Drawn(tokens, scaled.gather(1, tokens[:, None])[:, 0] - mass, allowed.logsumexp(1) - mass)


def _truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B, V), -inf on what top-k, then top-p (Holtzman et al. 2020), then min-p leave out."""
    ordered, order = logits.sort(dim=1, descending=True, stable=True)  # (B, V)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        kept[:, sampling.top_k :] = False
    if sampling.top_p < 1:
        p = ordered.masked_fill(~kept, float("-inf")).softmax(1, dtype=torch.float64)
        kept &= p.cumsum(1) - p < sampling.top_p
    if sampling.min_p > 0:
        kept &= ordered >= ordered[:, :1] + math.log(sampling.min_p)
    return logits.masked_fill(~torch.zeros_like(kept).scatter(1, order, kept), float("-inf"))


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens (B,) with P(token) proportional to weights (B, V).

    Two levels: the cumulative sums of blocks of columns choose a block, then those inside it choose a column.
    """
    V = weights.shape[1]
    whole = V // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(2)  # (B, V // BLOCK)
    if whole < V:
        sums = torch.cat([sums, weights[:, whole:].sum(1, keepdim=True)], dim=1)
    coarse = sums.double().cumsum(1)  # (B, blocks)
    block, rest = _first_above(coarse, uniforms * coarse[:, -1])
    columns = block[:, None] * BLOCK + torch.arange(BLOCK, device=weights.device)  # (B, BLOCK)
    inside = weights.gather(1, columns.clamp(max=V - 1)).double().masked_fill(columns >= V, 0.0)
    column, _ = _first_above(inside.cumsum(1), rest)
    return block * BLOCK + column


def _first_above(cdf: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first column of each row whose cumulative sum exceeds target, and how far target is into it.

    A target that rounding has put at or past the end falls just below it: the column has a positive weight.
    """
    last = cdf[:, -1]
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    column = torch.searchsorted(cdf, target[:, None], right=True)  # (B, 1)
    below = F.pad(cdf, (1, 0)).gather(1, column)[:, 0]
    return column[:, 0], target - below
