"""The means of what happened between two lines of metrics."""

from __future__ import annotations

import time

from torch import Tensor


class Window:
    """Sums over steps, which stay on the device until they are asked for."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._tokens = 0
        self._seconds = self._waited = 0.0

    def add(self, loss: Tensor, norm: Tensor, *, tokens: int, seconds: float, waited: float) -> None:
        """Note one step: its loss and gradient norm (scalars), tokens, seconds, and those spent on its input."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._tokens += tokens
        self._seconds += seconds
        self._waited += waited

    def take(self) -> dict[str, float]:
        """Means a step of loss, gradient norm, seconds and waiting, and tokens per second; then empty."""
        steps, started = len(self._losses), time.perf_counter()
        loss = sum(map(float, self._losses)) / steps  # waits for the device
        norm = sum(map(float, self._norms)) / steps
        seconds = self._seconds + time.perf_counter() - started
        tokens, waited = self._tokens, self._waited
        self._losses, self._norms, self._tokens, self._seconds, self._waited = [], [], 0, 0.0, 0.0
        return {
            "loss": loss,
            "grad_norm": norm,
            "perf/tokens_per_second/train": tokens / seconds,
            "perf/input_wait_seconds": waited / steps,
            "time/step": seconds / steps,
        }
