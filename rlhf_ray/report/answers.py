"""What a policy said to the same prompts before and after, each token coloured by its KL or its value.

A token's KL is how much likelier the policy finds it than the reference does, in nats; its value is the reward that the
critic still expected before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from rlhf_ray.report.record import RunRecord
from rlhf_ray.report.text import escape, number

KL_LEVELS = (0.05, 0.25, 1.0)
"""Nats from which a token's colour is one shade stronger."""
SPECIAL = re.compile(r"<\|(\w+)\|>")
MOST_ROWS = 3
"""Best, worst and random rows shown of each."""

CONTROLS = """<div class="colouring">
<input type="radio" name="by" id="by-kl" checked><label for="by-kl">KL</label>
<input type="radio" name="by" id="by-value"><label for="by-value">value</label>
"""


def answers(records: Sequence[RunRecord]) -> str:
    """Prompts in rows; of one run its first and its last answers side by side, of several their last ones."""
    rounds = _rounds(records)
    if not rounds:
        return ""
    prompts = [row["prompt"] for row in rounds[0][1]]
    said = [{row["prompt"]: row for row in rows} for _, rows in rounds]
    values = [v for of in said for row in of.values() for v in row.get("token_value") or ()]
    middle = sum(values) / len(values) if values else 0.0
    reach = max((abs(v - middle) for v in values), default=0.0) or 1.0
    items = []
    for prompt in prompts:
        cells = [
            _answer(title, of[prompt], middle, reach)
            for (title, _), of in zip(rounds, said, strict=True)
            if prompt in of
        ]
        items.append(
            f'<div class="probe"><p class="prompt">{turns(prompt)}</p><div class="pair">{"".join(cells)}</div></div>'
        )
    return (
        "<h2 id=answers>The same questions, before and after</h2>"
        '<p class="lead">Fixed prompts, answered with the same random numbers each time; nothing is learned from them.'
        f" Point at or tap a token for its numbers.</p>{CONTROLS}{_legends(middle, reach, bool(values))}"
        f"{''.join(items)}</div>"
    )


def _rounds(records: Sequence[RunRecord]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Title and rows of each column."""
    if len(records) == 1:
        found = sorted(records[0].probes.items())
        return [(f"step {step}", rows) for step, rows in found]
    probed = [(record, sorted(record.probes.items())) for record in records if record.probes]
    before = [("before", probed[0][1][0][1])] if probed else []
    return before + [(f"{record.name}, step {rounds[-1][0]}", rounds[-1][1]) for record, rounds in probed]


def turns(prompt: str) -> str:
    """A prompt as HTML: what is answered, and smaller above it what was said before, and by whom."""
    parts = SPECIAL.split(prompt)
    html = escape(parts[0])
    spoken = [(name, text) for name, text in zip(parts[1::2], parts[2::2], strict=True) if text.strip()]
    for name, text in spoken[:-1]:
        html += f"<small>{escape(name)}: {escape(text.strip())}</small>"
    return html + "".join(escape(text.strip()) for _, text in spoken[-1:])


def _answer(title: str, row: dict[str, Any], middle: float, reach: float) -> str:
    values = row.get("token_value") or [None] * len(row["tokens"])
    tokens = zip(row["tokens"], row["token_kl"], values, row["token_advantage"], strict=True)
    body = "".join(_token(*facts, middle, reach) for facts in tokens)
    facts = f"score {number(row['score'])} · KL {number(row['kl'])}" + ("" if row["finished"] else " · cut off")
    return f'<div class="answer"><h4>{escape(title)} <small>{facts}</small></h4><p>{body}</p></div>'


def _token(text: str, kl: float, value: float | None, advantage: float, middle: float, reach: float) -> str:
    classes = ["t", _level("k", kl, KL_LEVELS)]
    numbers = f"KL {number(kl, signed=True)}"
    if value is not None:
        classes.append(_level("v", value - middle, [reach * share for share in (0.15, 0.4, 0.7)]))
        numbers += f" · value {number(value)}"
    numbers += f" · advantage {number(advantage, signed=True)}"
    special = SPECIAL.fullmatch(text)
    word = text.lstrip(" ") or text
    shown = f"<em>{escape(special[1])}</em>" if special else escape(word)
    space = " " * (len(text) - len(word))
    return f'{space}<span class="{" ".join(filter(None, classes))}" data-n="{escape(numbers)}">{shown}</span>'


def _level(name: str, size: float, levels: Sequence[float]) -> str:
    """A class of the style: k+2 is two shades above 0."""
    step = sum(abs(size) >= level for level in levels)
    return f"{name}{'p' if size > 0 else 'm'}{step}" if step else ""


def _legends(middle: float, reach: float, valued: bool) -> str:
    """What the colours mean, for each way of colouring."""
    most = KL_LEVELS[-1]
    kl = _scale("k", f"−{most:g}", f"+{most:g} nats", "likelier for the reference", "likelier for the policy")
    value = _scale("v", number(middle - reach), number(middle + reach), "less reward expected", "more")
    return f'<div class="scales">{kl}{value if valued else ""}</div>'


def _scale(name: str, low: str, high: str, left: str, right: str) -> str:
    cells = [f"{name}m3", f"{name}m2", f"{name}m1", "", f"{name}p1", f"{name}p2", f"{name}p3"]
    chips = "".join(f'<i class="t {cell}"></i>' for cell in cells)
    return f'<p class="scale {name}">{left} <b>{low}</b> {chips} <b>{high}</b> {right}</p>'


def extremes(record: RunRecord) -> str:
    """The best, worst and some random answers of the newest step that has samples."""
    if not record.samples or "pick" not in record.samples[0]:
        return ""
    step = record.samples[0]["step"]
    parts = []
    for pick, better in (("best", -1), ("random", 0), ("worst", 1)):
        rows = [row for row in record.samples if row["pick"] == pick]
        rows = sorted(rows, key=lambda row: better * _rank(row["score"]))[:MOST_ROWS]
        parts.append(f"<div><h4>{pick}</h4>{''.join(map(_sample, rows))}</div>")
    return f'<h3>Best, random and worst answers of step {step}</h3><div class="thirds">{"".join(parts)}</div>'


def _rank(score: float) -> float:
    """What rows are sorted by: one without a score is the worst."""
    return -math.inf if math.isnan(score) else score


def _sample(row: dict[str, Any]) -> str:
    facts = f"score {number(row['score'])} · KL {number(row['kl'])} · advantage {number(row['advantage'], signed=True)}"
    return (
        f'<div class="sample"><p class="prompt">{turns(row["prompt"])}</p><p>{_said(row["response"])}</p>'
        f"<small>{facts}</small></div>"
    )


def _said(response: str) -> str:
    """A response as HTML, its special tokens as small words."""
    parts = SPECIAL.split(response)
    return escape(parts[0]) + "".join(
        f"<em>{escape(name)}</em>{escape(text)}" for name, text in zip(parts[1::2], parts[2::2], strict=True)
    )
