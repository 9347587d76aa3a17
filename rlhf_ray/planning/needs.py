"""What a process needs in each phase of a run, and what all of them need at the same time.

Phases follow each other in a step: generate, judge, learn, publish; start comes before the first one and save after
some.  Roles without a process of their own, as in a run without Ray, share one.

Left out on purpose: how many bytes anything has (``sizes.py``) and who holds what (``roles.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Device = Literal["cpu", "cuda"]
PHASES = ("start", "generate", "judge", "learn", "publish", "save")
OVERLAPPING = ("generate", "judge")
MIB = 2**20

BASE: dict[Device, dict[str, int]] = {
    "cpu": {"rollout": 190, "reward": 190, "reference": 190, "learner": 200, "driver": 265, "ray": 600},
    "cuda": {"rollout": 400, "reward": 400, "reference": 400, "learner": 400},
}
"""MiB of a process that has done nothing yet: on a CPU its private memory with everything imported, measured; on a GPU
its context and the kernels that it loads, assumed."""
SLACK: dict[Device, float] = {"cpu": 0.25, "cuda": 0.1}
"""What the allocator takes on top of memory that comes and goes: on a CPU measured, on a GPU assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one process of a role needs, in bytes."""

    role: str
    processes: int
    device: Device
    base: int
    """Of a process that has done nothing yet."""
    held: Mapping[str, int] = field(default_factory=dict)
    """What lives from start to end, by name."""
    passing: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """What comes and goes, by phase and name."""

    def work(self, phase: str) -> int:
        """Bytes in a phase without the base: what is held, and what comes and goes, with the allocator's share."""
        passing = sum(self.passing.get(phase, {}).values())
        return sum(self.held.values()) + int(passing * (1 + SLACK[self.device]))

    def at(self, phase: str) -> int:
        """Bytes in a phase."""
        return self.base + self.work(phase)

    @property
    def phase(self) -> str:
        """The phase that needs most."""
        return max(PHASES, key=self.at)

    @property
    def peak(self) -> int:
        """Bytes in that phase."""
        return self.at(self.phase)


def base_of(role: str, device: Device) -> int:
    """Bytes of a role's process that has done nothing yet."""
    return BASE[device][role] * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a run needs of one kind of memory: that of the host, or that of one card."""

    device: Device
    needs: Sequence[Need]
    together: bool
    """Whether all roles share one process."""
    returns: bool
    """Whether a process gives back what it does not need until its next phase; else it keeps its peak."""
    elsewhere: Sequence[Need] = ()
    """Roles on the host of a run that is planned for a card; not part of the sum."""

    @property
    def phase(self) -> str:
        """The phase in which most is needed."""
        return max(PHASES, key=self.at)

    @property
    def total(self) -> int:
        """Bytes needed at the same time, at most."""
        return self.at(self.phase)

    def at(self, phase: str) -> int:
        """Bytes of all processes in a phase.

        Processes of their own judge what is generated while more is being generated.
        """
        if self.together:
            return max(need.base for need in self.needs) + sum(need.work(phase) for need in self.needs)
        if not self.returns:
            return sum(need.processes * need.peak for need in self.needs)
        phases = OVERLAPPING if phase in OVERLAPPING else (phase,)
        return sum(need.processes * max(map(need.at, phases)) for need in self.needs)
