"""Which prompts a step takes: endless epochs, each a seeded permutation of the prompt set.

The batch of a step is a pure function of (seed, step), so the step number is all that a checkpoint must
remember, and any step can be taken again.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from rlhf_ray.types import PromptBatch


@lru_cache(maxsize=4)
def _epoch(n_prompts: int, seed: int, epoch: int) -> np.ndarray:
    """(n_prompts,) the order of one epoch."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n_prompts)
    order.flags.writeable = False
    return order


class PromptStream:
    """Prompt indices for every step, with random access.

    No prompt comes twice within an epoch; a batch may straddle two epochs, or hold several when it is larger
    than the prompt set.
    """

    def __init__(self, n_prompts: int, batch_size: int, *, group_size: int = 1, seed: int = 0) -> None:
        """Take ``batch_size`` rows a step, which are batch_size / group_size prompts.

        Raises ValueError when there are no prompts, or group_size does not divide batch_size.
        """
        if n_prompts < 1:
            raise ValueError(f"n_prompts is {n_prompts}: there is no prompt to take")
        if batch_size < 1 or group_size < 1 or batch_size % group_size:
            raise ValueError(f"batch_size is {batch_size}, expected a positive multiple of group_size ({group_size})")
        self.n_prompts = n_prompts
        self.batch_size = batch_size
        self.group_size = group_size
        self.seed = seed

    @property
    def prompts_per_step(self) -> int:
        """Prompts that one step takes."""
        return self.batch_size // self.group_size

    def take(self, step: int) -> PromptBatch:
        """The batch of a step, counted from 0."""
        assert step >= 0, step
        n = self.prompts_per_step
        positions = np.arange(step * n, (step + 1) * n, dtype=np.int64)
        epochs, slots = np.divmod(positions, self.n_prompts)
        prompts = np.empty(n, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            prompts[here] = _epoch(self.n_prompts, self.seed, int(epoch))[slots[here]]
        return PromptBatch(
            step=step,
            prompt_ids=np.repeat(prompts, self.group_size),
            group_ids=np.repeat(positions, self.group_size),
        )
