"""Ctrl-C and SIGTERM as a request: finish the step, save, stop.

The first signal sets a flag; a second Ctrl-C is told that the run is saving; a third raises
KeyboardInterrupt. SIGTERM, which cluster managers may repeat, never raises.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

_FIRST = b"\nstopping: this step is finished and saved first\n"
_AGAIN = b"\nstill saving; one more Ctrl-C gives up what this step has done\n"


class StopSignals:
    """Handlers of SIGINT and SIGTERM, in the main thread, from construction to `restore`."""

    def __init__(self) -> None:
        self.should_stop = False
        self._interrupts = 0
        self._before: dict[int, Any] = {n: signal.signal(n, self._on) for n in (signal.SIGINT, signal.SIGTERM)}

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self._interrupts > 2:
            raise KeyboardInterrupt
        # print() could be in the middle of a line of its own; a plain write can't meet it half-way.
        os.write(2, _AGAIN if self.should_stop else _FIRST)
        self.should_stop = True
