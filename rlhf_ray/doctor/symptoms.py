"""What each of the doctor's rules looks for: a function of a run's history to a clause with its numbers, or None.

A comparison with a metric that is not there is False, so what is not logged is no symptom.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, pstdev

from rlhf_ray.doctor.history import History

KL, SCORES, LENGTH, ENTROPY = "objective/kl", "objective/scores", "response_length/mean", "objective/entropy"
OWN = ("doctor/", "perf/", "time/")
"""Metrics that say nothing of how the model does."""


def _all(values: list[float], holds: Callable[[float], bool]) -> bool:
    """Whether something holds for every value; NaN holds nothing."""
    return all(holds(value) for value in values)


# ---- divergence: few and certain


def no_finite_update(h: History) -> str | None:
    """Three steps in a row without a single update."""
    if _all(h.last("update/skipped", 3), lambda x: x > 0) and _all(
        h.last("policy/optimiser_steps", 3), lambda x: x == 0
    ):
        return "no mini-batch of the last 3 steps had a finite loss and gradient"
    return None


def diverging_kl(h: History) -> str | None:
    """More than a nat a token away from the reference: another text altogether."""
    if _all(h.last(KL, 2), lambda x: x > 10) and h.mean(KL, 2) > h.mean(LENGTH, 2):
        return f"KL is {h.now(KL):.3g} nats over {h.now(LENGTH):.3g} tokens, more than one a token"
    return None


def collapsed(h: History) -> str | None:
    """A policy that once had many answers has one or two, or none of its tokens is left to chance."""
    if h.start("response/distinct") > 0.25 and _all(h.last("response/distinct", 3), lambda x: x < 0.05):
        return f"{h.now('response/distinct'):.1%} of a batch's answers differ, where {_began(h, 'response/distinct')}"
    start = h.start(ENTROPY, 1)
    if _all(h.last(ENTROPY, 3), lambda x: x < 0.01 * start):
        return f"entropy is {h.now(ENTROPY):.2g} nats a token, and was {start:.3g} at first"
    return None


# ---- numbers


def not_finite(h: History) -> str | None:
    """NaN or infinity anywhere."""
    names = [name for name, x in h.newest.items() if not name.startswith(OWN) and not math.isfinite(x)]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]} is {h.newest[names[0]]}{more}" if names else None


def skipped(h: History) -> str | None:
    """Mini-batches that the optimiser was not given."""
    count = h.now("update/skipped")
    return f"{count:g} mini-batches were skipped: loss or gradient was not finite" if count > 0 else None


def unscored(h: History) -> str | None:
    """Answers that the reward has no number for."""
    count = h.now("objective/unscored")
    return f"{count:g} of the batch's scores are NaN or infinite" if count > 0 else None


def rolled_back(h: History) -> str | None:
    """The run's count of rollbacks has risen."""
    now, before = h.last("doctor/rollbacks", 2)[::-1]
    if now > 0 and not before >= now:
        return f"the run went back to its last healthy checkpoint, for the {('first', 'second')[int(now) > 1]} time"
    return None


def spike(h: History) -> str | None:
    """A gradient or loss far beyond the usual."""
    for name, least in SPIKES.items():
        now, usual = abs(h.now(name)), h.usual(name)
        if now > 10 * usual and now > least:
            return f"{name} is {now:.3g}, and was {usual:.3g} until now"
    return None


SPIKES = {
    "policy/grad_norm": 1.0,
    "critic/grad_norm": 1.0,
    "loss/policy_avg": 1.0,
    "loss/value_avg": 1.0,
    "grad_norm": 1.0,
    "loss": 1.0,
}
"""Metrics that may leap, and sizes below which nobody minds."""


# ---- distance from the reference, and of one update


def negative_kl(h: History) -> str | None:
    """A mean below what chance allows: KL is never negative, its estimate hardly."""
    mean = h.mean(KL, 3)
    return f"KL is {mean:.3g} nats over the last 3 steps, and can't be negative" if mean < -0.5 else None


def high_kl(h: History) -> str | None:
    """Half a nat a token."""
    if _all(h.last(KL, 3), lambda x: x > 5) and h.mean(KL, 3) > 0.5 * h.mean(LENGTH, 3):
        return f"KL is {h.now(KL):.3g} nats over {h.now(LENGTH):.3g} tokens"
    return None


def first_kl_not_zero(h: History) -> str | None:
    """Policy and reference differ before anything was learned."""
    kl = h.now(KL)
    return (
        f"KL is {kl:.3g} nats before the first update, and must be 0" if h.now("step") == 1 and abs(kl) > 0.5 else None
    )


def ratio_not_one(h: History) -> str | None:
    """New against old probabilities: one before the first optimiser step, and on average."""
    error = h.now("val/first_ratio_error")
    if error > 0.3:
        return f"the first mini-batch's ratio is {error:.3g} away from one"
    if _all(h.last("val/ratio", 2), lambda x: abs(x - 1) > 0.1):
        return f"the mean ratio is {h.now('val/ratio'):.3g}, and should stay at one"
    return None


def clipped_too_often(h: History) -> str | None:
    """A third of all tokens at the edge of the trust region."""
    if _all(h.last("policy/clipfrac_avg", 3), lambda x: x > 0.3):
        return f"{h.now('policy/clipfrac_avg'):.0%} of the tokens were clipped"
    return None


# ---- what is said


def length_drifted(h: History) -> str | None:
    """Half as long again as at the start, or less than two thirds."""
    start = h.start(LENGTH)
    if _all(h.last(LENGTH, 3), lambda x: x > 1.5 * start and x > start + 5) or _all(
        h.last(LENGTH, 3), lambda x: x < start / 1.5 and x < start - 5
    ):
        return f"responses have {h.now(LENGTH):.3g} tokens, and had {start:.3g} in the first steps"
    return None


def answers_repeat(h: History) -> str | None:
    """Answers that say the same again and again."""
    name = "response/repetition"
    start = h.start(name)
    if _all(h.last(name, 3), lambda x: x > 0.2 and x > 2 * start):
        return f"{h.now(name):.0%} of the 3-grams of an answer were in it before, where {_began(h, name)}"
    return None


def entropy_gone(h: History) -> str | None:
    """A fifth of what it was."""
    start = h.start(ENTROPY)
    if _all(h.last(ENTROPY, 3), lambda x: x < start / 5):
        return f"entropy is {h.now(ENTROPY):.3g} nats a token, and was {start:.3g} in the first steps"
    return None


def entropy_risen(h: History) -> str | None:
    """Three times what it was."""
    start = h.start(ENTROPY)
    if _all(h.last(ENTROPY, 3), lambda x: x > 3 * start and x > start + 1):
        return f"entropy is {h.now(ENTROPY):.3g} nats a token, and was {start:.3g} in the first steps"
    return None


def never_ends(h: History) -> str | None:
    """Next to no response ends by itself."""
    if _all(h.last("objective/eos_rate", 3), lambda x: x < 0.1):
        return f"{h.now('objective/eos_rate'):.0%} of the responses end by themselves"
    return None


def empty_answers(h: History) -> str | None:
    """Responses of an EOS and nothing else."""
    if _all(h.last(LENGTH, 3), lambda x: x < 1.5):
        return f"responses have {h.now(LENGTH):.3g} tokens, their EOS included"
    return None


# ---- reward and critic


def judge_disagrees(h: History) -> str | None:
    """Over the newest 20 steps with an independent judge's opinion the score has risen, and the judge's has fallen."""
    judges = [name for name in h.newest if name.startswith("judge/")]
    for name in judges:
        score, judge = _drift(h.last(SCORES, 20)), _drift(h.last(name, 20))
        if score > 1 and judge < -1:
            return f"the score rises while {name} falls ({fmean(h.last(name, 20)[:10]):.3g} to {h.mean(name, 10):.3g})"
    return None


def _drift(values: list[float]) -> float:
    """By how many deviations the newer half lies above the older one; NaN when one is missing."""
    middle = len(values) // 2
    older, newer = values[:middle], values[middle:]
    if any(math.isnan(value) for value in values):
        return math.nan
    spread = (pstdev(older) + pstdev(newer)) / 2
    return (fmean(newer) - fmean(older)) / max(spread, 1e-9)


def all_alike(h: History) -> str | None:
    """No two scores of a batch differ."""
    if _all(h.last("objective/scores_std", 2), lambda x: x < 1e-6):
        return f"all answers of a batch score {h.now(SCORES):.3g}"
    return None


def nothing_learned(h: History) -> str | None:
    """Fifty steps, and the score is where it was."""
    start, now = h.start(SCORES, 10), h.mean(SCORES, 10)
    if h.steps >= 50 and now < start + 0.1 * h.mean("objective/scores_std", 10):
        return f"the score is {now:.3g} over the last 10 steps, and was {start:.3g} over the first 10"
    return None


def critic_worse_than_a_constant(h: History) -> str | None:
    """Ten steps in a row, at any time but the start."""
    name = "val/explained_variance"
    if h.steps >= 15 and _all(h.last(name, 10), lambda x: x < 0):
        return f"the critic explains {h.now(name):.3g} of the returns' variance, less than a constant would"
    return None


# ---- who waits for whom


def generator_differs(h: History) -> str | None:
    """Rows of the newest weights, but other log-probabilities than at the first step, when the weights were equal."""
    name = "mismatch/mean"
    limit = max(0.02, 5 * h.start(name, 1))
    if _all(h.last(name, 2), lambda x: x > limit) and h.now("staleness/max") == 0:
        return f"generator and learner differ by {h.now(name):.3g} nats a token on rows of the newest weights"
    return None


def too_stale(h: History) -> str | None:
    """Old rows whose weights are cut off."""
    name = "importance/truncated"
    if _all(h.last(name, 3), lambda x: x > 0.1) and h.now("staleness/max") > 0:
        return f"{h.now(name):.0%} of the tokens, up to {h.now('staleness/max'):g} updates old, are too likely by now"
    return None


def starved_learner(h: History) -> str | None:
    """Busy for less than a quarter of the time."""
    return _idle(h, "learner", 0.25)


def starved_generators(h: History) -> str | None:
    """Busy for less than a fiftieth of the time."""
    return _idle(h, "generator", 0.02)


def _idle(h: History, role: str, least: float) -> str | None:
    share = h.mean(f"perf/busy_share/{role}", 10)
    return f"the {role} was at work for {share:.0%} of the last 10 steps" if share < least else None


def _began(h: History, name: str) -> str:
    return f"it was {h.start(name):.0%} in the first steps"
