"""What every worker does around its work: its own thread count, and a count of tokens and busy seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlhf_ray.types import Usage


class Meter:
    """Counts a worker's tokens and busy seconds, and holds its torch thread count while it works.

    In one process several roles take turns with different thread counts; a role's sums are then those that it
    would have got in a process of its own.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._tokens = 0
        self._seconds = 0.0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Time a block of work, on this worker's threads."""
        before, start = torch.get_num_threads(), time.perf_counter()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - start
            if before != self.threads:
                torch.set_num_threads(before)

    def count(self, tokens: int) -> None:
        """Add to the tokens worked on."""
        self._tokens += tokens

    def take(self) -> Usage:
        """Read the meter and set it to zero."""
        usage = Usage(tokens=self._tokens, seconds=self._seconds)
        self._tokens, self._seconds = 0, 0.0
        return usage
