"""The means of what happened between two lines of metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from torch import Tensor


class Window:
    """Sums over steps, which stay on the device until they are asked for."""

    def __init__(self, losses: Sequence[float] = (), norms: Sequence[float] = ()) -> None:
        """An empty window, or one that goes on from the ``values`` of another process's."""
        self._losses: list[Tensor | float] = list(losses)
        self._norms: list[Tensor | float] = list(norms)
        self._timed = self._tokens = 0
        self._seconds = self._waited = 0.0

    def add(self, loss: Tensor, norm: Tensor, *, tokens: int, seconds: float, waited: float) -> None:
        """Note one step: its loss and gradient norm (scalars), tokens, seconds, and those spent on its input."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._timed += 1
        self._tokens += tokens
        self._seconds += seconds
        self._waited += waited

    def values(self) -> dict[str, list[float]]:
        """``losses`` and ``norms`` so far, a number a step: all that does not follow from the clock."""
        return {"losses": list(map(float, self._losses)), "norms": list(map(float, self._norms))}

    def skipped_at_last(self, count: int) -> tuple[float, float] | None:
        """Loss and norm of the newest step, where the newest ``count``, or all of them, were not both finite."""
        pairs = self._pairs()[-count:]
        return pairs[-1] if pairs and not any(map(_finite, pairs)) else None

    def _pairs(self) -> list[tuple[float, float]]:
        """Loss and norm of each step; waits for the device."""
        return list(zip(map(float, self._losses), map(float, self._norms), strict=True))

    def take(self) -> dict[str, float]:
        """Means of loss and gradient norm over the steps that were not skipped, and how many were; means of seconds and
        waiting, and tokens per second; then empty.
        """
        started = time.perf_counter()
        pairs = self._pairs()
        taken = [pair for pair in pairs if _finite(pair)]
        loss, norm = (sum(column) / len(taken) for column in zip(*taken, strict=True))
        seconds = self._seconds + time.perf_counter() - started
        tokens, timed, waited = self._tokens, self._timed, self._waited
        self._losses, self._norms = [], []
        self._timed, self._tokens, self._seconds, self._waited = 0, 0, 0.0, 0.0
        return {
            "loss": loss,
            "grad_norm": norm,
            "update/skipped": float(len(pairs) - len(taken)),
            "perf/tokens_per_second/train": tokens / seconds,
            "perf/input_wait_seconds": waited / timed,
            "time/step": seconds / timed,
        }


def _finite(pair: tuple[float, float]) -> bool:
    return all(map(math.isfinite, pair))
