"""Learning-rate schedules: a factor of the base rate for each update of a run.

``step`` counts the updates already made, so the first update has step 0 and the last total - 1.

Left out on purpose: state.  The factor depends on (step, total) alone, so a resumed run needs nothing but its
step.
"""

from __future__ import annotations

import math
from typing import Protocol

MAX_WARMUP_FRACTION = 0.1


class Schedule(Protocol):
    """The factor after ``step`` of ``total`` updates, of which a share warms up."""

    def __call__(self, step: int, total: int, warmup_fraction: float = ...) -> float: ...


def warmup_steps(total: int, fraction: float) -> int:
    """Return how many of a run's own updates warm up: ``fraction`` of them, never more than a tenth.

    A run of fewer than 10 updates has none.
    """
    return min(math.ceil(fraction * total), int(MAX_WARMUP_FRACTION * total))


def _rise_and_progress(step: int, total: int, fraction: float) -> tuple[float, float]:
    """Return the warm-up's factor (1 once it is over) and how much of the rest is done, in [0, 1]."""
    rise = warmup_steps(total, fraction)
    if step < rise:
        return (step + 1) / (rise + 1), 0.0
    return 1.0, min(1.0, (step - rise) / (total - rise))


def constant(step: int, total: int, warmup_fraction: float = 0.0) -> float:
    """Rise over ``warmup_steps``, none by default, then stay at 1."""
    return _rise_and_progress(step, total, warmup_fraction)[0]


def linear(step: int, total: int, warmup_fraction: float = 0.0) -> float:
    """Rise over ``warmup_steps``, none by default, then fall in a straight line.

    Without warm-up 1 - step / total: 1 at the first update, 1 / total at the last (Ziegler et al. 2019).
    """
    rise, progress = _rise_and_progress(step, total, warmup_fraction)
    return rise * (1.0 - progress)


def cosine(step: int, total: int, warmup_fraction: float = 0.03) -> float:
    """Rise over ``warmup_steps``, then fall along half a cosine that would reach 0 one update after the last.

    The first update's factor is never 0.  Loshchilov and Hutter 2017 (SGDR), eq. 5, without restarts.
    """
    rise, progress = _rise_and_progress(step, total, warmup_fraction)
    return rise * 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine}
