"""Hitting one random part of a run on a cluster of two machines every few seconds, and seeing when it works again.

Left out on purpose: whether the run minds, which ``chaos.py`` finds out.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGSTOP, Signals
from threading import Event, Lock, Thread

from ray.cluster_utils import Cluster

from rlhf_ray.rundir.metrics import FILE_NAME
from tests.hunting import descendants, title

LEARNER = "learner"
"""One or several ranks, of which none lives on when one of them dies."""
WORKERS = ("rollout", "reward", "reference", LEARNER)
MACHINE = "raylet"
PARTS = (*WORKERS, MACHINE)
SHARE_STOPPED = 0.25
"""Of the hits on workers whose calls have a short time limit."""
LOOK_SECONDS = 0.005
FIND_SECONDS = 0.3
CALL_SECONDS = 5.0
"""That a victim has to begin a call in which it is to be hit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """Seconds between hits."""

    pause: tuple[float, ...]
    """The least and the most between any two."""
    learner: float
    """Between two hits on the learner, at least."""
    stops_learner: bool
    """Whether every other one of these is a SIGSTOP."""
    machine: float
    """The same for the second machine."""
    down: float
    """Before another machine joins."""


@dataclass(slots=True, kw_only=True, eq=False)
class Strike:
    """One hit."""

    part: str
    how: str
    method: str | None
    """The call that it was in the middle of; None when it was hit at any time."""
    at: float
    """Monotonic seconds."""
    lost: int
    """Workers that went with it."""
    missing: int
    """Workers whose replacement has not been seen at work."""
    seconds: float | None = None
    """Until all of them were."""
    steps: int = 0
    """Steps of the run that were taken back."""


class Watch:
    """Sees who works, in a thread: a process belongs to the role in whose call it was seen."""

    def __init__(self, folder: Path, taken_back: Callable[[int], None]) -> None:
        """``folder`` is the run's; ``taken_back`` gets how many of its steps are no longer there."""
        self.workers: dict[int, str] = {}
        """Role by process."""
        self._taken_back = taken_back
        self._lost: dict[str, deque[Strike]] = {role: deque() for role in WORKERS}
        self._struck: set[int] = set()
        self._lock = Lock()
        self._metrics, self._lines = folder / FILE_NAME, 0
        self._over = Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def lose(self, strike: Strike, workers: Mapping[int, str]) -> None:
        """Take processes for dead, and their replacements for that of this hit."""
        with self._lock:
            self._struck.update(workers)
            self.workers = {pid: role for pid, role in self.workers.items() if pid not in workers}
            for role in workers.values():
                self._lost[role].append(strike)

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            pids = [pid for pid in descendants() if title(pid).startswith("ray::")]
            with self._lock:
                self.workers = {pid: role for pid, role in self.workers.items() if pid in pids}
            again = time.monotonic() + FIND_SECONDS
            while time.monotonic() < again:
                with self._lock:
                    for pid in pids:
                        if pid not in self.workers and pid not in self._struck:
                            self._look_at(pid)
                self._count_steps()
                time.sleep(LOOK_SECONDS)

    def _look_at(self, pid: int) -> None:
        role, _ = call_of(pid)
        if role not in WORKERS:
            return
        self.workers = {**self.workers, pid: role}
        if self._lost[role]:
            strike = self._lost[role].popleft()
            strike.missing -= 1
            if not strike.missing:
                strike.seconds = time.monotonic() - strike.at

    def _count_steps(self) -> None:
        lines = self._metrics.read_bytes().count(b"\n") if self._metrics.exists() else 0
        if lines < self._lines:
            self._taken_back(self._lines - lines)
        self._lines = lines


def call_of(pid: int) -> tuple[str, str]:
    """Role and method that a process is in the middle of."""
    role, _, method = title(pid).removeprefix("ray::").partition(".")
    return role, method


class Striker:
    """Hits parts of the run in a folder, on a cluster with a second machine."""

    def __init__(self, rhythm: Rhythm, cluster: Cluster, folder: Path, *, seed: int) -> None:
        self.rhythm, self.cluster = rhythm, cluster
        self.strikes: list[Strike] = []
        self._watch = Watch(folder, self._took_back)
        self._draw = random.Random(seed)
        self._returns = float("inf")

    @staticmethod
    def join(cluster: Cluster) -> None:
        """Have a second machine join."""
        cluster.add_node(num_cpus=2, labels={"machine": "second"})

    def strike_while(self, goes_on: Callable[[], bool], *, seconds: float) -> float:
        """Hit for so many seconds from when all roles work, and until every part was hit, while the run goes on.

        Returns how long that was.
        """
        while goes_on() and set(WORKERS) - set(self._watch.workers.values()):
            time.sleep(LOOK_SECONDS)
        begun = due = time.monotonic()
        while goes_on() and (time.monotonic() < begun + seconds or self._unhit()):
            if time.monotonic() >= due and (parts := self._may_be_hit()):
                self._hit(self._draw.choice(parts))
                due = time.monotonic() + self._draw.uniform(*self.rhythm.pause)
            if time.monotonic() >= self._returns:
                self.join(self.cluster)
                self._returns = float("inf")
            time.sleep(LOOK_SECONDS)
        lasted = time.monotonic() - begun
        if self._returns < float("inf"):
            self.join(self.cluster)
        return lasted

    def stop(self) -> None:
        """Watch no more."""
        self._watch.stop()

    def _unhit(self) -> set[str]:
        return set(PARTS) - {strike.part for strike in self.strikes}

    def _may_be_hit(self) -> list[str]:
        """Parts that are there and have had their rest, those that were hit least often."""
        now = time.monotonic()
        last = {strike.part: strike.at for strike in self.strikes}
        rest = {LEARNER: self.rhythm.learner, MACHINE: self.rhythm.machine}
        there = {*self._watch.workers.values(), *([MACHINE] if self.cluster.worker_nodes else [])}
        able = [part for part in PARTS if part in there and now - last.get(part, 0.0) >= rest.get(part, 0.0)]
        often = Counter(strike.part for strike in self.strikes)
        return [part for part in able if often[part] == min(often[other] for other in able)]

    def _hit(self, part: str) -> None:
        if part == MACHINE:
            self._hit_machine()
            return
        pids = [pid for pid, role in self._watch.workers.items() if role == part]
        if not pids:
            return  # it has gone by itself, with the run
        pid = self._draw.choice(pids)
        method = self._wait_for_call(pid, part) if self._draw.random() < 0.5 else None
        number = SIGSTOP if self._stops(part) else SIGKILL
        with suppress(ProcessLookupError):  # so has this one
            os.kill(pid, number)
            self._note(part, number, method, dict.fromkeys(pids if part == LEARNER else [pid], part))

    def _stops(self, part: str) -> bool:
        """Whether a worker of this role is to hang rather than to die."""
        if part == LEARNER:
            return self.rhythm.stops_learner and sum(strike.part == part for strike in self.strikes) % 2 == 1
        return self._draw.random() < SHARE_STOPPED

    def _wait_for_call(self, pid: int, part: str) -> str | None:
        until = time.monotonic() + CALL_SECONDS
        while time.monotonic() < until:
            role, method = call_of(pid)
            if role == part:
                return method
            time.sleep(0.0005)
        return None

    def _hit_machine(self) -> None:
        (second,) = self.cluster.worker_nodes
        (raylet,) = second.all_processes["raylet"]
        there = set(descendants(raylet.process.pid))
        self._note(MACHINE, SIGKILL, None, {pid: role for pid, role in self._watch.workers.items() if pid in there})
        self.cluster.remove_node(second, allow_graceful=False)
        self._returns = time.monotonic() + self.rhythm.down

    def _note(self, part: str, number: Signals, method: str | None, workers: Mapping[int, str]) -> None:
        """Add a hit, which workers, by process, went with."""
        count = len(workers)
        strike = Strike(part=part, how=number.name, method=method, at=time.monotonic(), lost=count, missing=count)
        self.strikes.append(strike)
        self._watch.lose(strike, workers)

    def _took_back(self, steps: int) -> None:
        """The learner's last death did it."""
        next(strike for strike in reversed(self.strikes) if strike.part == LEARNER).steps += steps
