"""Numbers and strings as a reader sees them: three digits, true minus signs, nothing that could be markup."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from typing import Any

from rlhf_ray.rundir.config_diff import flat


def escape(value: object) -> str:
    """Any value as HTML text or the inside of a quoted attribute."""
    return html.escape(str(value), quote=True)


def number(value: float, *, signed: bool = False) -> str:
    """About three digits: 1.10, 0.031, 7,056; a true minus, and a plus where ``signed``."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    size = abs(value)
    if size >= 100:
        text = f"{size:,.0f}"
    elif size >= 10:
        text = f"{size:.1f}"
    else:
        text = f"{size:.2f}" if size >= 0.1 or size == 0 else f"{size:.2g}".replace("e-0", "e−")
    sign = "−" if value < 0 and text.strip("0.") else "+" if signed and value > 0 else ""
    return sign + text


def percent(share: float) -> str:
    """A share in per cent, to one place where that says something: 98.4 %, 100 %."""
    text = f"{abs(100 * share):.1f}".removesuffix(".0")
    sign = "−" if share < 0 and text != "0" else ""
    return f"{sign}{text}\N{NO-BREAK SPACE}%"


def difference(value: float, *, shares: bool = False) -> str:
    """How much larger one number is than another, of two shares in points of a per cent: +0.91, +1.56 points."""
    return f"{number(100 * value, signed=True)} points" if shares else number(value, signed=True)


def duration(seconds: float) -> str:
    """How long something took, in two units at most: 1 min 52 s, 3 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def rows(cells: Iterable[Iterable[str]], *, head: Iterable[str] = (), kind: str = "settings") -> str:
    """A table of cells that are HTML already; the first column names its row.

    ``kind`` is its class: words of settings may be broken anywhere, as paths are long.
    """
    titles = "".join(f"<th scope=col>{title}</th>" for title in head)
    lines = [f"<thead><tr>{titles}</tr></thead><tbody>" if titles else "<tbody>"]
    for first, *others in cells:
        lines.append(f"<tr><th scope=row>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>")
    return f'<table class="{kind}">{"".join(lines)}</tbody></table>'


def settings_of(config: dict[str, Any]) -> dict[str, str]:
    """Settings under dotted names, in a line each."""
    return {name: _plain(value) for name, value in flat(config).items()}


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, dict):
        return " ".join(f"{name}={_plain(part)}" for name, part in value.items()) or "none"
    if value is None or isinstance(value, bool):
        return {None: "unset", True: "yes", False: "no"}[value]
    return str(value)
