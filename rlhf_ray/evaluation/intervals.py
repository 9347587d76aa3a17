"""How sure the numbers of a comparison are: 95 % intervals of means, shares and differences of pairs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rlhf_ray.evaluation.answers import Answers

Z95 = 1.959964  # quantile of the standard normal distribution for a two-sided 95 % interval

Interval = tuple[float, float]


def wilson(share: float, n: int) -> Interval:
    """The score interval of Wilson (1927) of a share of n."""
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    return centre - half, centre + half


def of_mean(values: Sequence[float]) -> Interval | None:
    """The normal interval of a mean; None of fewer than two values."""
    if len(values) < 2:
        return None
    mean, half = statistics.fmean(values), Z95 * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def intervals(baseline: Answers, policy: Answers) -> dict[str, dict[str, Interval]]:
    """Of each measure: baseline's, policy's, and that of the difference between two answers to one prompt.

    Pairs share their prompt and their random numbers, so that differences are surer than the means.
    """
    found: dict[str, dict[str, Interval]] = {"baseline": {}, "policy": {}, "difference": {}}
    before, after = _measures(baseline), _measures(policy)
    for name in before.keys() & after.keys():
        differences = [b - a for a, b in zip(before[name], after[name], strict=True)]
        for who, values in (("baseline", before[name]), ("policy", after[name]), ("difference", differences)):
            shares = name == "eos_rate" and who != "difference"
            interval = wilson(statistics.fmean(values), len(values)) if shares else of_mean(values)
            if interval is not None:
                found[who][name] = interval
    return found


def _measures(answers: Answers) -> dict[str, Sequence[float]]:
    """One number an answer, by the names of the table; what was not measured is left out."""
    measured = {
        "judge": answers.judged,
        "reward": answers.scores,
        "kl": answers.kl,
        "length": answers.lengths,
        "eos_rate": answers.finished,
    }
    return {name: values for name, values in measured.items() if values is not None}
