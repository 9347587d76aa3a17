"""The report of one run, or of several over each other, as one HTML file that needs no network.

First the answer to whether it learned, then curves, answers, and everything that one may want to look up.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.report import sections
from rlhf_ray.report.answers import answers, extremes
from rlhf_ray.report.curves import curves, legend
from rlhf_ray.report.record import TITLES, RunRecord
from rlhf_ray.report.style import SCRIPT, style
from rlhf_ray.report.summary import Fact, headline, verdict
from rlhf_ray.report.text import duration, escape, rows


def page(records: Sequence[RunRecord]) -> str:
    """The whole file; ValueError when the runs are of different stages."""
    stages = {record.stage for record in records}
    if len(stages) > 1:
        raise ValueError(f"the runs are of different stages: {', '.join(sorted(stages))}; give runs of one stage")
    one = records[0]
    title = f"{TITLES[one.stage]} · {', '.join(record.name for record in records)}"
    body = [
        f"<header><h1>{escape(title)}</h1>{_kicker(records)}</header>{legend(records)}",
        _single_headline(one) if len(records) == 1 else _headlines(records),
        sections.warnings(records),
        f"<h2>How it went</h2>{curves(records)}",
        answers(records),
        extremes(one) if len(records) == 1 else "",
        sections.evaluation(records),
        sections.closing(one) if len(records) == 1 else "",
        sections.memory(one) if len(records) == 1 else "",
        sections.facts(one) if len(records) == 1 else "",
        sections.configuration(records),
    ]
    folders = "<br>".join(escape(record.folder) for record in records)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style()}</style></head><body><main>{''.join(body)}"
        f'<footer>{folders}</footer></main><div id="readout" role="status" hidden></div>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _kicker(records: Sequence[RunRecord]) -> str:
    if len(records) > 1:
        return f'<p class="kicker">{len(records)} runs over each other</p>'
    record = records[0]
    parts = [f"{record.log[-1][0]:%-d %B %Y}"] if record.log else []
    parts += [f"{record.steps:,} steps", duration(record.seconds)]
    if record.machine:
        gpu, cores = record.machine["GPU"], record.machine["processor"].rpartition(", ")[2]
        parts.append(gpu if gpu != "none" else cores)
    return f'<p class="kicker">{" · ".join(f"<span>{escape(part)}</span>" for part in parts)}</p>'


def _single_headline(record: RunRecord) -> str:
    cards = "".join(
        f'<div><dt>{escape(fact.label)}</dt><dd class="value {fact.tone}">{escape(fact.value)}</dd>'
        f"<dd><small>{escape(fact.change)}</small></dd></div>"
        for fact in headline(record)
    )
    return (
        f'<p class="verdict">{escape(verdict(record) + sections.doubts(record))}</p><dl class="headline">{cards}</dl>'
    )


def _headlines(records: Sequence[RunRecord]) -> str:
    """A column a run of what stands in the headline of its own report."""
    facts = [{fact.label: fact for fact in headline(record)} for record in records]
    labels = dict.fromkeys(label for of in facts for label in of)
    lines = [[escape(label), *(_cell(of.get(label)) for of in facts)] for label in labels]
    names = [escape(record.name) for record in records]
    return "<h2>Did they learn?</h2>" + rows(lines, head=["", *names], kind="numbers")


def _cell(fact: Fact | None) -> str:
    return "" if fact is None else f"{escape(fact.value)} <small>{escape(fact.change)}</small>"
