"""A metric over the steps of a run: read, smoothed, and made small enough to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_POINTS = 160
"""Points of a line in a drawing; a longer one is drawn as the means of so many stretches."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Series:
    """Steps (N,) and values (N,) of one metric, without what is not finite."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def first(self) -> float:
        """The first value."""
        return float(self.values[0])

    @property
    def last(self) -> float:
        """The mean of the last tenth, ten values at most."""
        return float(self.values[-self.tail :].mean())

    @property
    def tail(self) -> int:
        """How many values that is."""
        return min(10, max(1, len(self) // 10))

    def smooth(self) -> Series:
        """Means of a window of a tenth around each value.

        It begins with the first value, as what happens first may be steep, and ends with the mean of the last ones, as
        the last of a noisy series says little.
        """
        places = np.arange(len(self))
        half = np.minimum(len(self) // 20, places)
        low, high = places - half, np.minimum(places + half + 1, len(self))
        sums = np.concatenate([[0.0], self.values.cumsum()])
        return Series(steps=self.steps, values=(sums[high] - sums[low]) / (high - low))

    def small(self) -> Series:
        """At most MOST_POINTS points, each the mean of its stretch."""
        return Series(steps=self._by_stretch(np.mean, self.steps), values=self._by_stretch(np.mean, self.values))

    def range(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, smallest and largest values of the same stretches."""
        values = self.values
        return self.small().steps, self._by_stretch(np.min, values), self._by_stretch(np.max, values)

    def _by_stretch(self, reduce: Any, numbers: np.ndarray) -> np.ndarray:
        if len(self) <= MOST_POINTS:
            return numbers.astype(float)
        return np.array([reduce(part) for part in np.array_split(numbers, MOST_POINTS)])


def series(rows: Sequence[dict[str, Any]], name: str) -> Series:
    """A metric at the steps that have it; of several rows of a step the last counts."""
    (found,) = together(rows, name)
    return found


def together(rows: Sequence[dict[str, Any]], *names: str) -> tuple[Series, ...]:
    """Metrics at the steps at which all of them are there and finite."""
    found = {row["step"]: [float(row[name]) for name in names] for row in rows if all(name in row for name in names)}
    steps = np.array(list(found), dtype=int)
    values = np.array(list(found.values()), dtype=float).reshape(len(steps), len(names))
    finite = np.isfinite(values).all(1)
    return tuple(Series(steps=steps[finite], values=column[finite]) for column in values.T)
