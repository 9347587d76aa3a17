"""The rows of a running batch: which prompt each slot serves, and how far it is.

What decides the control flow (lengths, budgets, who is free) is known on the host without asking the device;
what a step needs is kept on the device beside it.  Slots fill whole blocks of rows, because matrix products
over whole blocks give each row the same float32 sums whatever the other rows are.

Left out on purpose: the model and the sampling, which are the engine's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from rlhf_ray.models.kv_cache import KVCache, round_up

ROW_BLOCK = 16
FREE = -1

Whole = Callable[[int, int], int]
"""(n, block) -> at least n, in whole blocks."""


def doubled(n: int, block: int) -> int:
    """The smallest block, doubled as often as it takes, that is at least n: a few sizes serve every n."""
    return block << (max(1, round_up(n, block) // block) - 1).bit_length()


class Slots:
    """R slots over one cache, in the same memory for as long as they live.

    Outputs are addressed as prompt * budget + tokens so far; free slots write to a spare row.
    """

    def __init__(self, cache: KVCache, whole: Whole = round_up) -> None:
        """``whole`` says how many slots a step computes so that n fit."""
        R, device = len(cache.lengths), cache.lengths.device
        self.cache = cache
        self.budget = self.spare = 0
        self.active = R
        """Slots that a step computes: whole blocks that hold every busy slot."""
        self.prompt = np.full(R, FREE)
        self.lengths = np.zeros(R, dtype=np.int64)
        self.left = np.zeros(R, dtype=np.int64)
        self.busy = torch.zeros(R, 1, dtype=torch.bool, device=device)
        self.last = torch.zeros(R, dtype=torch.int64, device=device)  # token to feed next
        self.index = torch.zeros(R, dtype=torch.int64, device=device)  # where the next goes
        self.done = torch.zeros(R, dtype=torch.bool, device=device)  # a stop token was drawn
        self._whole = whole

    def reset(self, *, budget: int, spare: int) -> None:
        """Free every slot; ``spare`` is the address of the spare row."""
        self.budget, self.spare = budget, spare
        self._release(np.arange(len(self.prompt)))

    @property
    def taken(self) -> np.ndarray:
        """(n,) the busy slots, ascending."""
        return np.flatnonzero(self.prompt != FREE)

    @property
    def free(self) -> np.ndarray:
        """(n,) the free slots, ascending."""
        return np.flatnonzero(self.prompt == FREE)

    def start(self, slots: np.ndarray, prompts: np.ndarray, lengths: np.ndarray, last: np.ndarray) -> None:
        """Give slots (n,) to prompts (n,): their rows hold lengths (n,) tokens, ``last`` (n,) is fed next."""
        self.prompt[slots], self.lengths[slots], self.left[slots] = prompts, lengths, self.budget
        self.active = self._size(int(self.taken[-1]) + 1)
        where = self._tensor(slots)
        self.cache.lengths[where] = self._tensor(lengths)
        self.busy[where] = True
        self.done[where] = False
        self.last[where] = self._tensor(last)
        self.index[where] = self._tensor(prompts * self.budget)

    def stepped(self, steps: int) -> None:
        """Count the tokens that the busy slots drew; free those that drew EOS or have no budget left."""
        taken = self.taken
        self.lengths[taken] += steps
        self.left[taken] -= steps
        done = self.done.cpu().numpy()
        ended = taken[done[taken] | (self.left[taken] == 0)]
        if len(ended):
            self._release(ended)

    def compact(self) -> None:
        """Move busy slots to the front when that saves a block of rows."""
        taken = self.taken
        active = self._size(len(taken))
        if active >= self.active:
            return
        source = taken[taken >= active]
        if len(source):
            target = self.free[: len(source)]
            self.cache.longest = int(self.lengths.max())
            old, new = self._tensor(source), self._tensor(target)
            self.cache.move(old, new)
            for tensor in (self.busy, self.last, self.index, self.done):
                tensor[new] = tensor[old]
            for array in (self.prompt, self.lengths, self.left):
                array[target] = array[source]
            self._release(source)
        self.active = active

    def _size(self, n: int) -> int:
        return min(self._whole(n, ROW_BLOCK), len(self.prompt))

    def _release(self, slots: np.ndarray) -> None:
        self.prompt[slots], self.lengths[slots], self.left[slots] = FREE, 0, 0
        where = self._tensor(slots)
        self.busy[where] = False
        self.done[where] = False
        self.index[where] = self.spare
        self.cache.lengths[where] = 0

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.last.device)
