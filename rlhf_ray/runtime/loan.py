"""The memory of the learner's base, for workers on its card that are built with it instead of a copy.

When the learner dies that memory is gone, and so are the rows that were under way.  Whoever borrowed then begins anew,
after the learner, and is built with the new one's memory.

Left out on purpose: how memory is opened (``workers/lending.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rlhf_ray.models.shared_base import FrozenBase
from rlhf_ray.runtime.crew import RayCrew
from rlhf_ray.workers.lending import borrow


class Loan:
    """Asked for whenever a worker starts; the learner is asked once in its life."""

    def __init__(self, learner: RayCrew, base: FrozenBase) -> None:
        self._learner, self._base = learner, base
        self._lenders: list[Any] = []

    def base(self) -> FrozenBase:
        """The base as a borrower opens it; waits until the learner has started."""
        if self._lenders != self._learner.actors:
            self._learner.wait_until_built()
            self._lenders, lent = self._learner.actors, self._learner.aside("lend")
            found = None if lent is None else partial(borrow, lent, otherwise="this process has a copy of the base")
            self._base = replace(self._base, borrow=found)
        return self._base

    def given(
        self, own: Callable[[], Sequence[dict[str, Any]]], argument: Callable[[FrozenBase], dict[str, Any]]
    ) -> Callable[[], Sequence[dict[str, Any]]]:
        """What each worker's arguments differ in, with the ``argument`` that has the base in it."""
        return lambda: [{**one, **argument(self.base())} for one in own()]
