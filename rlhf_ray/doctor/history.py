"""A run's metrics as rules ask for them: how it began, and its newest steps.

A metric that a row lacks, or that is not finite, is NaN here, and no comparison with NaN holds: so a rule that compares
is silent about runs that do not log its metric.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, median

FIRST, NEWEST = 10, 60
"""Rows that are kept of a run's beginning and of its newest steps; no rule looks at others."""

Row = Mapping[str, float]


class History:
    """The first and the newest rows of metrics.jsonl."""

    def __init__(self) -> None:
        self._first: list[Row] = []
        self._newest: deque[Row] = deque(maxlen=NEWEST)
        self.steps = 0
        """Rows seen."""

    def add(self, row: Row) -> None:
        """Take note of the next row, which has a ``step``."""
        self.steps += 1
        if len(self._first) < FIRST:
            self._first.append(row)
        self._newest.append(row)

    @property
    def newest(self) -> Row:
        """The newest row."""
        return self._newest[-1]

    def now(self, name: str) -> float:
        """A metric of the newest row."""
        return _value(self.newest, name)

    def last(self, name: str, count: int) -> list[float]:
        """A metric of the newest ``count`` rows, NaN for those that there are too few."""
        values = [_value(row, name) for row in list(self._newest)[-count:]]
        return [math.nan] * (count - len(values)) + values

    def mean(self, name: str, count: int) -> float:
        """Mean over the newest ``count`` rows, NaN unless all have the metric."""
        return fmean(self.last(name, count))

    def start(self, name: str, count: int = 3) -> float:
        """Mean over the first ``count`` rows, NaN unless all have the metric."""
        return fmean([_value(row, name) for row in self._first[:count]])

    def usual(self, name: str, count: int = 20, *, least: int = 5) -> float:
        """Median of the sizes of a metric over the ``count`` rows before the newest, NaN for fewer than ``least``."""
        sizes = [abs(x) for x in self.last(name, count + 1)[:-1] if not math.isnan(x)]
        return median(sizes) if len(sizes) >= least else math.nan


def _value(row: Row, name: str) -> float:
    value = row.get(name, math.nan)
    return value if math.isfinite(value) else math.nan
