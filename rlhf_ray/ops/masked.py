"""Statistics and sums over the entries of a mask, and the ways to turn per-token losses into one number.

Masked-out entries never matter, not even when they are NaN: every function replaces them by ``torch.where``
before any arithmetic, so neither a value nor a gradient can leak through ``0 * nan``.

The aggregations divide by a denominator that the caller computes once for the whole mini-batch, over all its
micro-batches and ranks.  The sum of the micro-batches' gradients is then the mini-batch's gradient, however
it is split.

Left out on purpose: communication.  ``Aggregation.count`` is additive, so whoever holds several ranks sums
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-8
"""Added to a variance before its root, as in Ziegler et al., openai/lm-human-preferences."""


def mask_out(x: Tensor, mask: Tensor) -> Tensor:
    """Return x (...) with 0 wherever mask (...), bool, is False; the gradient there is 0 as well."""
    return torch.where(mask, x, 0.0)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum x (...) over mask (...): a scalar tensor, 0 for an empty mask."""
    return mask_out(x, mask).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average x (...) over mask (...): a scalar tensor, 0 for an empty mask."""
    return masked_sum(x, mask) / _size(mask)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Biased variance of x (...) over mask (...): a scalar tensor, 0 for an empty mask."""
    return _moments(x, mask)[2]


def _size(mask: Tensor) -> Tensor:
    """Entries of mask, at least 1."""
    return mask.count_nonzero().clamp(min=1)  # a third of the time that its sum takes


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, what x (...) differs from it by, 0 outside mask, and biased variance."""
    size = _size(mask)
    mean = masked_sum(x, mask) / size
    centred = mask_out(x - mean, mask)
    return mean, centred, centred.square().sum() / size


def whiten(x: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Scale x (...) to unit variance and, unless ``keep_mean``, zero mean over mask (...), 0 elsewhere.

    The statistics are those of the entries given: pass the whole batch, of all ranks, not a shard of it.
    Biased variance and epsilon as in Ziegler et al. (openai/lm-human-preferences, ``whiten``).
    """
    mean, centred, variance = _moments(x, mask)
    whitened = centred * torch.rsqrt(variance + EPSILON)
    return mask_out(whitened + mean, mask) if keep_mean else whitened


def response_columns(mask: Tensor) -> slice:
    """First to last of the columns where any row of mask (B, T), bool, is True; column 0 for an empty mask."""
    (filled,) = mask.any(0).nonzero(as_tuple=True)
    return slice(int(filled[0]), int(filled[-1]) + 1) if len(filled) else slice(0, 1)


def _row_means(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over rows of each row's mean over its mask: a scalar tensor."""
    return (mask_out(x, mask).sum(1) / mask.sum(1).clamp(min=1)).sum()


def _token_count(mask: Tensor, max_length: int) -> Tensor:
    return mask.sum()


def _row_count(mask: Tensor, max_length: int) -> Tensor:
    return mask.any(1).sum()


def _slot_count(mask: Tensor, max_length: int) -> Tensor:
    return _row_count(mask, max_length) * max_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregation:
    """Turns per-token terms into one loss: ``total`` of these rows over ``count`` of the whole mini-batch."""

    total: Callable[[Tensor, Tensor], Tensor]
    """(x (B, T), mask (B, T)) to a scalar tensor; additive over rows."""
    count: Callable[[Tensor, int], Tensor]
    """(mask (B, T), max_length) to a scalar tensor, additive over rows; max_length bounds a response.

    Rows without a single response token are not counted, so rows that only fill up a rank change nothing."""

    def __call__(self, x: Tensor, mask: Tensor, *, denominator: Tensor | float) -> Tensor:
        """Return the share of x (B, T) in the mini-batch's loss, a scalar tensor.

        ``denominator`` is the sum of ``count`` over every micro-batch and rank of the mini-batch.  Add up
        the results (and the gradients) of the parts; a data-parallel wrapper that averages gradients needs
        them times its size.
        """
        return self.total(x, mask) / denominator


token_mean = Aggregation(total=masked_sum, count=_token_count)
"""Every token weighs the same (DAPO, and TRL's PPO)."""
sequence_mean = Aggregation(total=_row_means, count=_row_count)
"""Every sequence weighs the same, whatever its length (GRPO)."""
constant = Aggregation(total=masked_sum, count=_slot_count)
"""Sum over N * T_max, the same divisor whatever the lengths turn out to be (Dr. GRPO)."""

AGGREGATIONS: dict[str, Aggregation] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": constant,
}
