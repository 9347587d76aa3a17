"""A plan as a person reads it: a table of roles and phases, and a line on what was chosen."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.config import PPOConfig
from rlhf_ray.planning.choose import Plan, gigabytes, value_of
from rlhf_ray.planning.needs import PHASES, Prediction

COLUMNS = ("role", "workers", *PHASES, "peak", "all")


def rows(prediction: Prediction) -> list[Sequence[object]]:
    """GB of one process of each role in each phase, at its peak, and of all its processes."""
    found: list[Sequence[object]] = []
    for need in prediction.needs:
        phases = [_gb(need.at(phase)) for phase in PHASES]
        found.append((need.role, need.processes, *phases, _gb(need.peak), _gb(need.processes * need.peak)))
    at_once = [_gb(prediction.at(phase)) for phase in PHASES]
    return [*found, ("at once", sum(need.processes for need in prediction.needs), *at_once, "", _gb(prediction.total))]


def summary(plan: Plan, config: PPOConfig) -> str:
    """One line: what is needed of what there is, and what was chosen so that it fits."""
    whose = "of the card" if plan.prediction.device == "cuda" else "of the host"
    fits = f"{gigabytes(plan.prediction.total)} GB {whose} predicted, {gigabytes(plan.budget)} GB there"
    for need in plan.prediction.elsewhere:
        whose = "their base" if need.role == "base" else f"{need.role} workers"
        fits += f"; {need.processes} x {gigabytes(need.peak)} GB of host memory for {whose}"
    if not plan.chosen:
        return f"memory: {fits}; nothing had to be changed"
    changes = ", ".join(
        f"{name} {_shown(value_of(config, name))} -> {_shown(value)}" for name, value in plan.chosen.items()
    )
    return f"memory: {fits}; chosen so that it fits, results differ by rounding alone: {changes}"


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gb(amount: int) -> float:
    return round(amount / 1e9, 2)
