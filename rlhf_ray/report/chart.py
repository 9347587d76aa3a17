"""Small charts as SVG by matplotlib, in colours that the page's style decides: CSS variables, so light, dark and paper.

matplotlib knows no such variables: it is given colours that stand for them, which are replaced in what it writes.

Left out on purpose: titles, units and legends, which are the page's text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rlhf_ray.report.series import Series
from rlhf_ray.report.text import escape, number, percent

COLOURS = 8
"""Colours that the style knows for lines; further lines begin again."""
INK, MUTED, GRID = "#0000f0", "#0000f1", "#0000f2"
"""matplotlib leaves black out, so no line's colour stands for itself as black."""
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {f"#0000a{i}": f"line{i}" for i in range(COLOURS)}

STEPS = (1, 2, 2.5, 5, 10)
"""Between ticks, times a power of ten."""
WIDTH, HEIGHT = 352, 186
"""In pixels."""
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 24
"""Margins in pixels."""
LABELS = 84
"""Margin on the right for the names of lines."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Line:
    """One line of a chart."""

    label: str
    series: Series
    colour: int
    faint: bool = False
    """Thin, as it stands beside what the chart is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a chart looks like."""

    title: str
    shares: bool = False
    """Values are shares, shown in per cent."""
    within: tuple[float, float] = (-math.inf, math.inf)
    """Values outside of which nothing is shown."""
    labelled: bool = False
    """Names stand at the ends of the lines."""


def lines(drawn: Sequence[Line], look: Look) -> str:
    """Lines over the steps: each value faintly, their means over a tenth strongly."""

    def draw(axes: Axes) -> None:
        for line in drawn:
            colour = _colour(line)
            if len(line.series) > 20:
                steps, low, high = line.series.range()
                if len(steps) < len(line.series):
                    axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
                else:
                    axes.plot(line.series.steps, line.series.values, color=colour, alpha=0.3, linewidth=1)
            mean = line.series.smooth().small()
            axes.plot(mean.steps, mean.values, color=colour, linewidth=1.1 if line.faint else 1.9)
            axes.plot(mean.steps[-1:], mean.values[-1:], "o", color=colour, markersize=4)
        if look.labelled:
            ends = [float(line.series.smooth().values[-1]) for line in drawn]
            _end_labels(axes, drawn, ends)

    drawn = [line for line in drawn if len(line.series)]
    return _svg(draw, look, drawn)


def stack(drawn: Sequence[Line], look: Look) -> str:
    """Areas on top of each other, which share their steps; each has its name where it ends."""

    def draw(axes: Axes) -> None:
        small = [line.series.smooth().small() for line in drawn]
        values = [series.values for series in small]
        colours = [_colour(line) for line in drawn]
        axes.stackplot(small[0].steps, values, colors=colours, linewidth=0, alpha=0.85)
        tops = np.cumsum([series.values[-1] for series in small])
        middles = [float(top - series.values[-1] / 2) for top, series in zip(tops, small, strict=True)]
        _end_labels(axes, drawn, middles)
        axes.set_ylim(bottom=0)

    return _svg(draw, look, drawn)


def path(drawn: Sequence[tuple[Line, Line]], look: Look) -> str:
    """Where runs went: the first of each pair across, the second upwards; a ring begins and a dot ends it."""

    def draw(axes: Axes) -> None:
        for across, upwards in drawn:
            colour = _colour(across)
            x, y = across.series, upwards.series
            axes.plot(x.small().values, y.small().values, "o", color=colour, markersize=2.6, alpha=0.35)
            x, y = x.smooth().small(), y.smooth().small()
            axes.plot(x.values, y.values, color=colour, linewidth=1.9)
            axes.plot(x.values[:1], y.values[:1], "o", color=colour, markersize=6, fillstyle="none")
            axes.plot(x.values[-1:], y.values[-1:], "o", color=colour, markersize=5)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))

    drawn = [pair for pair in drawn if len(pair[0].series)]
    return _svg(draw, look, [line for pair in drawn for line in pair])


def _end_labels(axes: Axes, named: Sequence[Line], values: Sequence[float]) -> None:
    """Names to the right of the axes, beside the values as far as they do not lie on each other."""
    low, high = axes.get_ylim()
    shares = [(value - low) / (high - low) for value in values]
    outside: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
    for line, place in zip(named, spread(shares, gap=14 / axes.bbox.height), strict=True):
        axes.plot([1.03], [place], "s", color=_colour(line), markersize=6, **outside)
        axes.text(1.065, place, line.label, color=MUTED, va="center", **outside)


def _colour(line: Line) -> str:
    return f"#0000a{line.colour % COLOURS}"


def spread(shares: Sequence[float], gap: float) -> list[float]:
    """Places at most 1 and ``gap`` apart, in the order of the shares and near them."""
    order = sorted(range(len(shares)), key=lambda i: shares[i])
    places = list(shares)
    for below, here in pairwise(order):
        places[here] = max(places[here], places[below] + gap)
    top = 1.0
    for here in reversed(order):
        places[here] = min(places[here], top)
        top = places[here] - gap
    return places


def _svg(draw: Callable[[Axes], None], look: Look, shown: Sequence[Line]) -> str:
    """An SVG element with a name for who can't see it; an empty chart says so."""
    if not shown:
        return '<p class="empty">not measured</p>'
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": look.title, "font.size": 11, "path.simplify": True}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)
        right = LABELS if look.labelled else RIGHT
        axes = figure.add_axes(
            (LEFT / WIDTH, BOTTOM / HEIGHT, (WIDTH - LEFT - right) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT)
        )
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        axes.margins(x=0.02, y=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=STEPS))
        draw(axes)
        _dress(axes, look)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    said = "; ".join(_said(line, look) for line in shown)
    return _themed(text.getvalue(), f"{look.title}: {said}")


def _dress(axes: Axes, look: Look) -> None:
    """Light lines across, no frame, few and short numbers."""
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=MUTED, pad=5)
    low, high = axes.get_ylim()
    if high - low < 1e-6 * max(abs(high), 1e-9):  # of a constant
        low, high = low - 0.5, high + 0.5
    least, most = (0.0, 1.0) if look.shares else look.within
    margin = 0.04 * (min(high, most) - max(low, least))  # so that a line at the edge is seen whole
    axes.set_ylim(max(low, least - margin), min(high, most + margin))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, look)))


def _tick(value: float, look: Look) -> str:
    if look.shares:
        return percent(value)
    text = f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def _said(line: Line, look: Look) -> str:
    shown: Any = percent if look.shares else number
    return f"{line.label} from {shown(line.series.first)} to {shown(line.series.last)}"


def _rounded(coordinates: re.Match[str]) -> str:
    """The coordinates of an attribute to a hundredth of a pixel."""
    return re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}", coordinates[0])


def _themed(svg: str, name: str) -> str:
    """What matplotlib wrote as part of a page: without its own fonts, colours, names of groups and empty space."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r"(font-size|font-family|font): [^;\"]*; ?", "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r' (d|x|y|width|height)="[^"]*"', _rounded, svg)
    svg = re.sub("#0000[0-9a-f]{2}", lambda found: f"var(--{VARIABLES[found[0]]})", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None, "matplotlib gives every SVG its viewBox"
    return f'<svg {box[0]} role="img" aria-label="{escape(name)}">' + svg[svg.index(">") + 1 :].strip()
