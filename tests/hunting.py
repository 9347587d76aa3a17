"""Finding the actors of this process's own Ray in the middle of a call, and making them suffer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread

PROC = Path("/proc")


def _parent(pid: int) -> int:
    try:
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def title(pid: int) -> str:
    """What Ray calls a worker process: ``ray::rollout.generate`` while that call is carried out."""
    try:
        return (PROC / str(pid) / "cmdline").read_text().rstrip("\0 ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def descendants(ancestor: int | None = None) -> list[int]:
    """Every process that this one or another ancestor, or one of those, has started."""
    parents = {int(path.name): _parent(int(path.name)) for path in PROC.iterdir() if path.name.isdigit()}
    found = new = [ancestor or os.getpid()]
    while new := [pid for pid, parent in parents.items() if parent in new]:
        found += new
    return found[1:]


def strike(call: str, number: signal.Signals, *, during: str = "", seconds: float = 120.0) -> None:
    """Send a signal to an actor that is in the middle of ``<role>.<method>``; the first to be seen there.

    ``during`` is a call of another one's that can't end without it: what is done already is let go.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pids = descendants()
        again = time.monotonic() + 0.3
        while time.monotonic() < again:
            for pid in pids:
                if title(pid) == f"ray::{call}":
                    os.kill(pid, signal.SIGSTOP)
                    if title(pid) == f"ray::{call}" and (not during or _waits(during, pids)):  # it has not ended
                        os.kill(pid, number)
                        return
                    os.kill(pid, signal.SIGCONT)
            time.sleep(0.0005)
    raise AssertionError(f"nobody was seen at {call} for {seconds:g} s")


Strike = tuple[Callable[[], bool], str, signal.Signals] | tuple[Callable[[], bool], str, signal.Signals, str]
"""When, and the arguments of `strike`."""


def _waits(call: str, pids: Sequence[int]) -> bool:
    """Whether one of the processes is at a call, a while after it should have ended."""
    time.sleep(0.3)
    return any(title(pid) == f"ray::{call}" for pid in pids)


class Hunt:
    """Strikes one after the other, beside the test."""

    def __init__(self, *strikes: Strike) -> None:
        self.left = list(strikes)
        self._thread = Thread(target=self._run, args=(strikes,), daemon=True)
        self._thread.start()

    def _run(self, strikes: Sequence[Strike]) -> None:
        for when, call, number, *during in strikes:
            while not when():
                time.sleep(0.001)
            strike(call, number, during="".join(during))
            self.left.pop(0)
