"""Did it learn?  A few numbers before and after, and the answer in words.

Before is the first step, whose batch the untrained policy sampled; after is the mean of the last tenth of the steps.
A reward has changed when it did so by three standard errors of that difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_ray.report.curves import metric
from rlhf_ray.report.record import RunRecord
from rlhf_ray.report.series import Series
from rlhf_ray.report.text import difference, number, percent

CLEAR = 3.0
"""Standard errors from which a change is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One number of the headline."""

    label: str
    value: str
    change: str
    """Where it comes from, and by how much it changed."""
    tone: str = ""
    """good or bad, where more or less is that."""


def headline(record: RunRecord) -> list[Fact]:
    """The few numbers that tell how a run went."""
    return _ppo(record) if record.stage == "ppo" else _stage(record)


def _ppo(record: RunRecord) -> list[Fact]:
    facts = [
        _moved(record, "Reward", "objective/scores", tone=_reward_tone(record)),
        _moved(record, "KL, nats a response", "objective/kl"),
        _moved(record, "Tokens a response", "response_length/mean"),
        _moved(record, "Ended by EOS", "objective/eos_rate", shares=True),
    ]
    win = (record.evaluation or {}).get("win_rate")
    if win:
        tone = "good" if win["low"] > 0.5 else "bad" if win["high"] < 0.5 else ""
        interval = f"95 % interval {100 * win['low']:.1f} to {100 * win['high']:.1f}"
        facts.append(Fact(label="Win-rate, held out", value=percent(win["rate"]), change=interval, tone=tone))
    return [fact for fact in facts if fact]


def _stage(record: RunRecord) -> list[Fact]:
    held_out = metric(record, "eval/loss") is not None
    facts = [
        _moved(record, "Loss, held out", "eval/loss", tone=_falls(record, "eval/loss")) if held_out else None,
        _moved(record, "Loss, training", "loss", tone=_falls(record, "loss")) if not held_out else None,
        _moved(record, "Accuracy, held out", "eval/accuracy", shares=True),
        _moved(record, "Perplexity, held out", "eval/perplexity"),
    ]
    speed = metric(record, "perf/tokens_per_second/train")
    if speed:
        facts.append(Fact(label="Tokens a second", value=number(speed.last), change="trained, in the last steps"))
    return [fact for fact in facts if fact]


def _moved(record: RunRecord, label: str, name: str, *, shares: bool = False, tone: str = "") -> Fact | None:
    values = metric(record, name)
    if values is None:
        return None
    shown = percent if shares else number
    after, before = _after(record, values), values.first
    change = f"from {shown(before)}, {difference(after - before, shares=shares)}"
    return Fact(label=label, value=shown(after), change=change, tone=tone)


def _after(record: RunRecord, values: Series) -> float:
    """PPO's numbers are of one batch each; a stage's are held-out measurements, of which the last one counts."""
    return values.last if record.stage == "ppo" else float(values.values[-1])


def _falls(record: RunRecord, name: str) -> str:
    values = metric(record, name)
    assert values is not None
    return "good" if values.values[-1] < values.first else "bad"


def reward_change(record: RunRecord) -> tuple[float, float] | None:
    """How far the mean score moved and the standard error of that; None without scores."""
    scores, spread = metric(record, "objective/scores"), metric(record, "objective/scores_std")
    if scores is None or spread is None or len(scores) < 2:
        return None
    rows = record.config["batch_size"]
    error = math.sqrt(spread.first**2 / rows + spread.last**2 / (rows * scores.tail))
    return scores.last - scores.first, error


def _reward_tone(record: RunRecord) -> str:
    moved = reward_change(record)
    if moved is None or abs(moved[0]) < CLEAR * moved[1]:
        return ""
    return "good" if moved[0] > 0 else "bad"


def verdict(record: RunRecord) -> str:
    """The answer in a sentence or two, which claims no more than the numbers carry."""
    return _ppo_verdict(record) if record.stage == "ppo" else _stage_verdict(record)


def _ppo_verdict(record: RunRecord) -> str:
    scores, kl = metric(record, "objective/scores"), metric(record, "objective/kl")
    moved = reward_change(record)
    if scores is None or kl is None or moved is None:
        return "Too few steps to say what changed."
    words = {"good": "rose", "bad": "fell", "": "did not clearly change,"}[_reward_tone(record)]
    text = f"The reward {words} from {number(scores.first)} to {number(scores.last)}"
    text += f" (standard error of the change {number(moved[1])})"
    text += f" while the policy moved {number(kl.last)} nats a response away from the reference."
    win = (record.evaluation or {}).get("win_rate")
    if win:
        interval = f"95 % interval {percent(win['low'])} to {percent(win['high'])}"
        interval = f"{percent(win['rate'])} of held-out prompts ({interval})"
        if win["low"] > 0.5:
            text += f" A judge that no training touched prefers its answers on {interval}."
        elif win["high"] < 0.5:
            text += f" But a judge that no training touched prefers them on only {interval}: the reward was gamed."
        else:
            text += f" A judge that no training touched sees no clear difference: it prefers them on {interval}."
    return text


def _stage_verdict(record: RunRecord) -> str:
    loss, training = metric(record, "eval/loss"), metric(record, "loss")
    chosen = loss if loss is not None and len(loss) > 1 else training
    if chosen is None:
        return "Too few steps to say what changed."
    what = "held-out loss" if chosen is loss else "training loss"
    word = "fell" if chosen.values[-1] < chosen.first else "rose"
    text = f"The {what} {word} from {number(chosen.first)} to {number(chosen.values[-1])} nats."
    accuracy = metric(record, "eval/accuracy")
    if accuracy is not None:
        text += f" It ranks {percent(accuracy.values[-1])} of held-out pairs as their labels do,"
        text += f" {percent(accuracy.first)} before."
    return text
