"""metrics.jsonl, the truth about a run: one strict JSON object a line, ``{"step": 3, "loss": 0.5}``.

JSON has no NaN and no infinities, so they are written as the strings "NaN", "Infinity" and "-Infinity" and
read back as the numbers that they were: a run that diverges shows it, and any JSON reader can read the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_ray.rundir.files import parse_json, replace_text

FILE_NAME = "metrics.jsonl"
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def metrics_line(step: int, metrics: Mapping[str, float]) -> str:
    """One line of metrics.jsonl, its newline included; anything that float() takes is a value."""
    assert "step" not in metrics, "'step' is the line's own key"
    row = {"step": step} | {name: _to_json(value) for name, value in metrics.items()}
    return json.dumps(row, allow_nan=False) + "\n"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, [] when there is none; a last line still being written is left out.

    ValueError names file and line of one that can't be read.
    """
    return [row for row, _ in _rows(Path(folder) / FILE_NAME)]


def trim_metrics(folder: Path, last_step: int | None) -> None:
    """Remove the lines of later steps than ``last_step`` (None: of no step) and an unfinished last line."""
    path = folder / FILE_NAME
    if not path.exists():
        return
    kept = "".join(line for row, line in _rows(path) if last_step is None or row["step"] <= last_step)
    if kept.encode() != path.read_bytes():
        replace_text(path, kept)


def _rows(path: Path) -> list[tuple[dict[str, Any], str]]:
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was never finished
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: bad JSON: {error}; mend or delete the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}:{number}: is not an object with a 'step'; mend or delete the line")
        special = {key: _SPECIAL.get(value, value) for key, value in row.items() if isinstance(value, str)}
        rows.append((row | special, line.decode() + "\n"))
    return rows


def _to_json(value: float) -> float | str:
    if isinstance(value, int):
        return value
    number = float(value)
    if math.isnan(number):
        return "NaN"
    return number if math.isfinite(number) else ("Infinity" if number > 0 else "-Infinity")
