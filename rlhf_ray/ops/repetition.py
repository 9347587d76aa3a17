"""How much a batch of responses repeats itself: within each, and from one to the next.

seq-rep-n of Welleck et al. 2019 ("Neural Text Generation with Unlikelihood Training"), and a plain count of different
responses.

Left out on purpose: texts; tokens are at hand in every step and cost next to nothing.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

BITS = 21
"""Of a token number, so that three fit into 63."""


def repeated_ngrams(tokens: Tensor, mask: Tensor, n: int = 3) -> Tensor:
    """Share (B,) of each row's n-grams inside mask that occurred in the row before, 0 for rows without one.

    ``tokens`` is (B, T) int64, ``mask`` (B, T) bool; n is at most 3.
    """
    assert n * BITS < 64, n
    if tokens.shape[1] < n:
        return torch.zeros(len(tokens))
    count = tokens.shape[1] - n + 1
    inside, grams = mask[:, :count].clone(), tokens[:, :count].clone()  # (B, T - n + 1)
    for i in range(1, n):
        inside &= mask[:, i : count + i]
        grams += tokens[:, i : count + i] << i * BITS
    nothing = -1 - torch.arange(count)  # each unlike all others
    ordered = np.sort(torch.where(inside, grams, nothing).numpy(), axis=1)  # torch's sort takes eight times as long
    repeated = (ordered[:, 1:] == ordered[:, :-1]).sum(1)
    return torch.from_numpy(repeated) / inside.sum(1).clamp(min=1)


def distinct_rows(tokens: Tensor, mask: Tensor) -> float:
    """Different responses over all responses; ``tokens`` is (B, T) int64, ``mask`` (B, T) bool."""
    responses, ends = tokens[mask].numpy(), [0, *mask.sum(1).cumsum(0).tolist()]
    return len({responses[start:end].tobytes() for start, end in pairwise(ends)}) / len(tokens)
