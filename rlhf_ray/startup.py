"""Where the seconds between a command and its first step go.

Left out on purpose: what other threads and processes do meanwhile; a phase is what this one waited for.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/self/stat")


def process_age() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    if not STAT.is_file():
        return 0.0
    after_name = STAT.read_text(encoding="utf-8").rpartition(")")[2].split()
    began = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


class StartUp:
    """Phases that follow each other, from a moment ``age`` seconds ago."""

    def __init__(self, *, age: float = 0.0) -> None:
        self._last = time.perf_counter() - age
        self.seconds: dict[str, float] = {}
        """Of each phase, in order."""

    def done(self, phase: str) -> None:
        """All the time since the phase before this one was this phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        """``time/startup_<phase>`` of each phase."""
        return {f"time/startup_{phase}": seconds for phase, seconds in self.seconds.items()}

    def __str__(self) -> str:
        shown = {name.replace("_", " "): seconds for name, seconds in self.seconds.items() if seconds >= 0.05}
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in shown.items())
        return f"start-up {sum(self.seconds.values()):.1f} s: {phases}"
