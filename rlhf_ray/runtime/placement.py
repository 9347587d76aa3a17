"""Which machine each worker goes to, decided before any of them starts.

A role asks (`Request`), the cluster's machines offer what they have free (`Node`), and `place` gives every worker a
`Seat` or says who finds none: Ray itself would wait for ever.  A worker fits a machine when that one has the cores, and
the GPU share on one card, left; what the machines have between them does not help.

A seat is a wish, not a bond.  Ray keeps to it while its machine is there and goes elsewhere when it is not, so that a
worker whose machine has died comes back on another one.

Left out on purpose: placement groups and node affinity, which wait for a machine that is full; Ray itself, but for the
names of its options; moving a worker that has started.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from rlhf_ray import console

NODE_ID = "ray.io/node-id"
"""Label that Ray gives every machine."""
EPSILON = 1e-6
"""Sums of shares such as 0.1 are off by less; Ray itself counts in 1e-4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of the cluster."""

    id: str
    name: str
    cpus: float
    """All of them."""
    gpus: float
    free_cpus: float
    free_gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)
    here: bool = False
    """Whether this process runs on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What one role asks for."""

    role: str
    count: int
    cpus: float
    """Each."""
    gpus: float = 0.0
    """Each."""
    gpu: Literal["needed", "welcome"] = "needed"
    """welcome: where a machine has no share of that size left, a worker makes do with its cores."""
    spread: bool = False
    """Whether every worker goes where the fewest of its role are, instead of where the run already is."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels of the machines that are taken first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One worker's place."""

    node: Node
    cpus: float
    gpus: float
    labels: Mapping[str, str]
    neighbours: int
    """Workers of its role on its machine, itself included."""

    @property
    def options(self) -> dict[str, Any]:
        """Ray's options for the worker's actor: its machine; else one with its labels; else any that has room."""
        preferred = [dict(self.labels), {}] if self.labels else [{}]
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "label_selector": {NODE_ID: self.node.id},
            "fallback_strategy": [{"label_selector": labels} for labels in preferred],
        }

    @property
    def cores(self) -> int:
        """Its share of the machine's cores, when those of its role divide them."""
        cores = (os.cpu_count() or 1) if self.node.here else int(self.node.cpus)
        return max(1, cores // self.neighbours)


class _Room:
    """What is left of a machine while seats are given away."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.cpus = node.free_cpus
        whole = int(node.free_gpus + EPSILON)
        self.cards = [1.0] * whole + [node.free_gpus - whole] * (node.free_gpus - whole > EPSILON)
        self.seated: dict[str, int] = {}

    def take(self, role: str, cpus: float, gpus: float) -> bool:
        """Give a worker its share if it is there: of the fullest card that has it, or of as many whole cards."""
        wanted = [1.0] * int(gpus) if gpus > 1 else [gpus] * (gpus > 0)
        fitting = sorted(i for i, left in enumerate(self.cards) if wanted and left >= wanted[0] - EPSILON)
        if self.cpus < cpus - EPSILON or len(fitting) < len(wanted):
            return False
        for i in sorted(fitting, key=self.cards.__getitem__)[: len(wanted)]:
            self.cards[i] -= wanted[0]
        self.cpus -= cpus
        self.seated[role] = self.seated.get(role, 0) + 1
        return True


def place(requests: Sequence[Request], nodes: Iterable[Node]) -> tuple[dict[str, list[Seat]], dict[str, int]]:
    """Seats of every role, and how many of each role find none.

    The roles choose in the order in which they are given.  One that is not spread goes to this process's machine while
    that has room (so the learner, which writes checkpoints, is beside the driver), then to those where the run is.
    """
    rooms = [_Room(node) for node in nodes]
    seats: dict[str, list[Seat]] = {}
    lacking: dict[str, int] = {}
    for request in requests:
        taken = [room for _ in range(request.count) if (room := _seat(request, rooms))]
        seats[request.role] = [
            Seat(
                node=room.node,
                cpus=request.cpus,
                gpus=gpus,
                labels=request.labels,
                neighbours=room.seated[request.role],
            )
            for room, gpus in taken
        ]
        if len(taken) < request.count:
            lacking[request.role] = request.count - len(taken)
    return seats, lacking


def _seat(request: Request, rooms: Sequence[_Room]) -> tuple[_Room, float] | None:
    """The best machine with room for one more worker, and the GPU share that it gives."""

    def rank(room: _Room) -> tuple[Any, ...]:
        strange = any(room.node.labels.get(name) != value for name, value in request.labels.items())
        if request.spread:
            return strange, room.seated.get(request.role, 0), -room.cpus
        return strange, not room.node.here, not room.seated

    shares = [request.gpus, 0.0] if request.gpu == "welcome" and request.gpus else [request.gpus]
    for room in sorted(rooms, key=rank):
        for gpus in shares:
            if room.take(request.role, request.cpus, gpus):
                return room, gpus
    return None


def where(seats: Mapping[str, Sequence[Seat]]) -> str:
    """One line: how many workers of each role are to go to which machine."""
    counts = {role: Counter(seat.node.name for seat in taken) for role, taken in seats.items()}
    roles = [f"{role} {', '.join(f'{n} on {name}' for name, n in found.items())}" for role, found in counts.items()]
    return f"workers: {'; '.join(roles)}"


def refuse(requests: Sequence[Request], nodes: Sequence[Node], lacking: Mapping[str, int]) -> NoReturn:
    """Show what is asked for and what is there as two tables, and raise ValueError with advice."""
    asked = [(r.role, r.count, r.cpus, r.gpus, r.count * r.cpus, r.count * r.gpus) for r in requests]
    total = ("all", sum(row[1] for row in asked), "", "", sum(row[4] for row in asked), sum(row[5] for row in asked))
    console.table("asked for", ("role", "workers", "CPU each", "GPU each", "CPU", "GPU"), [*asked, total])
    console.table(
        "there are",
        ("machine", "CPU", "free", "GPU", "free", "labels"),
        [
            (
                f"{node.name} (this one)" if node.here else node.name,
                *(node.cpus, node.free_cpus, node.gpus, node.free_gpus),
                " ".join(f"{name}={value}" for name, value in node.labels.items()),
            )
            for node in nodes
        ],
    )
    raise ValueError(
        f"the cluster can't give {' and '.join(_short(requests, nodes, lacking))}; ask for fewer workers, for a "
        "smaller share of a core or GPU each, or add machines"
    )


def _short(requests: Sequence[Request], nodes: Sequence[Node], lacking: Mapping[str, int]) -> list[str]:
    """What there is too little of in all; else whose share is on no one machine."""
    wanted = {
        "CPU": sum(r.count * r.cpus for r in requests),
        "GPU": sum(r.count * r.gpus for r in requests if r.gpu == "needed"),
    }
    there = {"CPU": (sum(n.cpus for n in nodes), sum(n.free_cpus for n in nodes))}
    there["GPU"] = (sum(n.gpus for n in nodes), sum(n.free_gpus for n in nodes))
    short = []
    for name, amount in wanted.items():
        for have, state in zip(there[name], ("", " free"), strict=True):
            if amount > have + EPSILON:
                short.append(f"{amount:g} {name} (there are {have:g}{state})")
                break
    return short or [
        f"{lacking[r.role]} of {r.count} {r.role} workers {r.cpus:g} CPU and {r.gpus:g} GPU on any one machine"
        for r in requests
        if r.role in lacking
    ]
