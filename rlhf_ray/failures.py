"""What becomes of a run when its workers die: how many deaths it stands, and how it hears of those that it can't mend.

Left out on purpose: errors that a worker's own code raises.  Those are nobody's death: they are raised as they are.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from threading import Lock


class WorkerLost(RuntimeError):  # noqa: N818
    """A worker died with a state that nobody else has: a new one goes on from the last checkpoint."""

    def __init__(self, who: str, why: str) -> None:
        super().__init__(who, why)  # which is what it is made from again in another process
        self.who, self.why = who, why

    def __str__(self) -> str:
        return f"{self.who} died ({self.why})"


class GaveUp(RuntimeError):  # noqa: N818
    """Workers died more often than the run stands."""


class Diverged(RuntimeError):  # noqa: N818
    """What a run makes is not worth going on with; the message says what was seen."""

    def __init__(self, what: str, *, step: int, rollbacks: int) -> None:
        super().__init__(what)
        self.step, self.rollbacks = step, rollbacks
        """The step that shows it, and how often the run had gone back before."""


class Deaths:
    """A run's count of dead workers."""

    def __init__(self, most: int, window: float, say: Callable[[str], object]) -> None:
        """``most`` deaths in any ``window`` seconds are stood; ``say`` gets a line for each."""
        self.most, self.window, self.say = most, window, say
        self.count = 0
        """Of the whole run."""
        self._recent: deque[tuple[float, str]] = deque()
        self._lock = Lock()

    def note(self, who: str, why: str, then: str) -> None:
        """Count a death and say what is done about it; GaveUp, with who died how often, when it is one too many."""
        with self._lock:
            now = time.monotonic()
            self.count += 1
            self._recent.append((now, who))
            while now - self._recent[0][0] > self.window:
                self._recent.popleft()
            if len(self._recent) <= self.most:
                self.say(f"{who} died ({why}); {then}")
                return
            often = Counter(name for _, name in self._recent)
            names = ", ".join(f"{name} {_times(n)}" for name, n in often.most_common())
        raise GaveUp(
            f"workers died {_times(len(self._recent))} within {self.window:g} s, and max_restarts is {self.most}: "
            f"{names}; at last {who} ({why})"
        )


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"
