"""Which charts a stage has: the metric, what it is called and measured in, and how it is drawn.

Each is of one run, or of several over each other; what takes several lines of one run is then one line a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf_ray.report import chart
from rlhf_ray.report.chart import Line, Look
from rlhf_ray.report.record import RunRecord
from rlhf_ray.report.series import Series, series, together
from rlhf_ray.report.text import escape, number, percent

FROM_ZERO = (0.0, math.inf)
PHASES = ("generate", "judge", "learn", "publish", "save", "probe")
ROLES = ("generator", "reward", "reference", "learner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One metric over the steps."""

    title: str
    unit: str
    metric: str
    beside: str = ""
    """Another metric in the same chart of one run, as the training loss beside the held-out one."""
    beside_unit: str = ""
    shares: bool = False
    within: tuple[float, float] = (-math.inf, math.inf)


PPO = {
    "Reward and distance": [
        Curve(
            title="Reward",
            unit="mean score of a batch",
            metric="objective/scores",
            beside="objective/rlhf_reward",
            beside_unit="less the KL penalty",
        ),
        Curve(title="KL from the reference", unit="nats a response", metric="objective/kl"),
    ],
    "What the answers are like": [
        Curve(title="Length", unit="tokens of a response", metric="response_length/mean"),
        Curve(title="Ended by EOS", unit="share of responses", metric="objective/eos_rate", shares=True),
        Curve(title="Entropy", unit="nats a token", metric="objective/entropy"),
    ],
    "How learning goes": [
        Curve(
            title="Value explained",
            unit="share of the returns' variance",
            metric="val/explained_variance",
            within=(-1.0, 1.0),
        ),
        Curve(
            title="Clipped",
            unit="tokens whose ratio left the range",
            metric="policy/clipfrac_avg",
            shares=True,
        ),
        Curve(title="Gradient", unit="norm before clipping, policy", metric="policy/grad_norm"),
    ],
}

STAGES = {
    "Learning": [
        Curve(title="Loss", unit="held out, nats", metric="eval/loss", beside="loss", beside_unit="training"),
        Curve(title="Accuracy", unit="held-out pairs", metric="eval/accuracy", shares=True),
        Curve(title="Margin", unit="score of chosen less rejected, held out", metric="eval/margin"),
        Curve(title="Perplexity", unit="held out, per token", metric="eval/perplexity"),
        Curve(title="Learning rate", unit="a step", metric="learning_rate"),
        Curve(title="Gradient", unit="norm before clipping", metric="grad_norm"),
    ],
    "Speed": [
        Curve(title="Tokens trained", unit="a second", metric="perf/tokens_per_second/train"),
        Curve(title="Step", unit="seconds", metric="time/step"),
    ],
}


def curves(records: Sequence[RunRecord]) -> str:
    """Every chart that the runs, which are of one stage, have numbers for, under their headings."""
    ppo = records[0].stage == "ppo"
    parts = []
    for heading, group in (PPO if ppo else STAGES).items():
        figures = [_figure(curve, records) for curve in group if any(_has(record, curve.metric) for record in records)]
        if heading == "Reward and distance":
            figures.append(_frontier(records))
        parts.append(_section(heading, figures))
    if ppo:
        parts.append(_section("Speed", [_phases(records), _roles(records), _throughput(records)]))
    return "".join(parts)


def _section(heading: str, figures: Sequence[str]) -> str:
    if not figures:
        return ""
    return f'<h3>{heading}</h3><div class="charts">{"".join(figures)}</div>'


def _has(record: RunRecord, metric: str) -> bool:
    return any(metric in row for row in record.metrics)


def _caption(title: str, unit: str, last: str, svg: str) -> str:
    now = f"<b>{last}</b>" if last else ""
    caption = f"<span><strong>{title}</strong> {now}</span><small>{unit}</small>"
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def _lines(records: Sequence[RunRecord], name: str) -> list[Line]:
    """One line a run that has the metric, in the run's colour."""
    found = [(i, record, series(record.metrics, name)) for i, record in enumerate(records)]
    return [Line(label=record.name, series=values, colour=i) for i, record, values in found if len(values)]


def _figure(curve: Curve, records: Sequence[RunRecord]) -> str:
    shown = percent if curve.shares else number
    drawn, unit, last = _lines(records, curve.metric), curve.unit, ""
    if len(records) == 1:
        last = shown(drawn[0].series.last) if drawn else ""
        beside = series(records[0].metrics, curve.beside) if curve.beside else None
        if beside:
            drawn.append(Line(label=curve.beside_unit, series=beside, colour=1, faint=True))
            unit = f"{_key(0)}{unit} &ensp;{_key(1)}{curve.beside_unit}"
    look = Look(title=curve.title, shares=curve.shares, within=curve.within)
    return _caption(curve.title, unit, last, chart.lines(drawn, look))


def _key(colour: int) -> str:
    return f'<i class="key line{colour}"></i>'


def _frontier(records: Sequence[RunRecord]) -> str:
    """Reward against KL: of two runs with as much reward, the better one lies to the left."""
    pairs = []
    for i, record in enumerate(records):
        kl, scores = together(record.metrics, "objective/kl", "objective/scores")
        across = Line(label="KL", series=kl, colour=i)
        pairs.append((across, Line(label=record.name, series=scores, colour=i)))
    svg = chart.path(pairs, Look(title="Reward against KL"))
    return _caption("Reward against KL", "score, by nats a response; from the ring to the dot", "", svg)


def _phases(records: Sequence[RunRecord]) -> str:
    """Where a step's seconds go; of several runs, how long their steps are."""
    look = Look(title="Seconds of a step", labelled=True)
    if len(records) > 1:
        drawn = _lines(records, "time/step")
        return _caption("Step", "seconds", "", chart.lines(drawn, Look(title="Step", within=FROM_ZERO)))
    rows = records[0].metrics
    steps = series(rows, "time/step")
    named = [phase for phase in PHASES if _has(records[0], f"time/{phase}")]
    full = [{name: row.get(f"time/{name}", 0.0) for name in named} | {"step": row["step"]} for row in rows]
    bands = [Line(label=name, series=series(full, name), colour=i) for i, name in enumerate(named)]
    weight = steps.values.sum() or 1.0
    bands = [line for line in bands if line.series.values.sum() > 0.002 * weight]
    return _caption("Step", "seconds, by what the run waits for", f"{number(steps.last)} s", chart.stack(bands, look))


def _roles(records: Sequence[RunRecord]) -> str:
    """Tokens a second of every role's workers while they are busy."""
    if len(records) > 1:
        drawn = _lines(records, "perf/tokens_per_second/generator")
        svg = chart.lines(drawn, Look(title="Tokens generated", within=FROM_ZERO))
        return _caption("Tokens generated", "a second, of busy workers", "", svg)
    rows = records[0].metrics
    drawn = [
        Line(label=role, series=values, colour=i)
        for i, role in enumerate(ROLES)
        if len(values := series(rows, f"perf/tokens_per_second/{role}"))
    ]
    svg = chart.lines(drawn, Look(title="Tokens a second", labelled=True, within=FROM_ZERO))
    return _caption("Tokens", "a second, of each role's busy workers", "", svg)


def _throughput(records: Sequence[RunRecord]) -> str:
    """Response tokens a second of the whole run, whatever it waits for."""
    drawn = []
    for i, record in enumerate(records):
        lengths, seconds = together(record.metrics, "response_length/mean", "time/step")
        speed = replace(lengths, values=lengths.values * record.config["batch_size"] / seconds.values)
        drawn.append(Line(label=record.name, series=speed, colour=i))
    last = number(drawn[0].series.last) if len(drawn) == 1 else ""
    svg = chart.lines(drawn, Look(title="Response tokens", within=FROM_ZERO))
    return _caption("Response tokens", "a second of the whole run", last, svg)


def legend(records: Sequence[RunRecord]) -> str:
    """The runs' names beside their colours."""
    if len(records) == 1:
        return ""
    names = "".join(f"<li>{_key(i % chart.COLOURS)}{escape(record.name)}</li>" for i, record in enumerate(records))
    return f'<ul class="legend">{names}</ul>'


def metric(record: RunRecord, name: str) -> Series | None:
    """A metric of a run, None where it was never logged."""
    values = series(record.metrics, name)
    return values if len(values) else None
