"""Which rows belong to which optimiser step: a seeded permutation for each epoch, read by step.

Because a batch is a pure function of (seed, step), a resumed run needs no data state, every rank knows the
whole batch without asking, and any number of ranks sees the same one.

Left out on purpose: curricula and sampling by weight; a row's weight belongs to the loss.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np


class BatchOrder:
    """The rows of every step; epochs follow each other without a gap, so every batch is full."""

    def __init__(self, *, rows: int, batch_size: int, seed: int) -> None:
        assert rows > 0, "no rows to train on"
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._permutation = lru_cache(maxsize=4)(self._draw)

    def _draw(self, epoch: int) -> np.ndarray:
        key = np.array([self.seed, epoch], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).permutation(self.rows)

    def rows_of(self, step: int) -> list[int]:
        """The rows of a step, counted from 1."""
        first = (step - 1) * self.batch_size
        places = (divmod(place, self.rows) for place in range(first, first + self.batch_size))
        return [int(self._permutation(epoch)[place]) for epoch, place in places]

    def epoch(self, step: int) -> float:
        """Epochs done after a step."""
        return step * self.batch_size / self.rows

    def total_steps(self, *, epochs: float, max_steps: int) -> int:
        """Steps of a run: ``max_steps``, or as many as see every row ``epochs`` times when that is 0."""
        return max_steps or math.ceil(epochs * self.rows / self.batch_size)
