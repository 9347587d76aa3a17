"""Weights that reach rollout workers without Ray's object store.

A learner on a GPU keeps them there, and workers on the same card read its memory (CUDA IPC).  One on a CPU sends them
to all workers at once over a gloo group of their own, which the first failure ends: nobody dies of it.  What goes
through Ray is a `Notice`.  The learner keeps as many versions as anybody may still need, so whoever lacks one (a worker
that came later, is on another card or was busy with older rows; all, when a broadcast failed) is given it through the
store.

Left out on purpose: NCCL, whose watchdog ends the process when a peer dies; the way through the store and who joins a
group, which are ``runtime/weight_sync.py``'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Lock
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_ray.models.flat import as_buffer, empty_flat, fill_flat
from rlhf_ray.types import Weights
from rlhf_ray.workers.lending import Lent, borrow, lend
from rlhf_ray.workers.ranks import Meeting, name_interface
from rlhf_ray.workers.sharding import whole
from rlhf_ray.workers.weights import digest, export_weights

PIECE = 1 << 26
"""Bytes of one message of a broadcast, each of which has its meeting's seconds."""


GROUP_ERRORS = (RuntimeError, OSError)
"""What gloo and its store raise, and sockets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Says that weights are out."""

    weights: Weights
    """Without their numbers."""
    lent: Lent | None = None
    """Memory of a card that they are in, if they stay there."""
    place: tuple[str, int] = ("", 0)
    """Whose memory, and which piece of it."""
    problem: str = ""
    """What kept the broadcast from reaching everybody."""


class Group:
    """Processes that exchange messages over gloo, none of which is the worse for another one's death."""

    def __init__(self, meeting: Meeting) -> None:
        """Wait for the others; RuntimeError when one does not come in time."""
        name_interface(meeting)
        self.meeting = meeting
        seconds = timedelta(seconds=meeting.timeout)
        store = dist.PrefixStore(meeting.name, dist.TCPStore(meeting.host, meeting.port, timeout=seconds))
        self._gloo: Any = dist.ProcessGroupGloo(store, meeting.rank, meeting.size, seconds)  # torch's stubs lack much

    def broadcast(self, data: np.ndarray) -> None:
        """Copy the first member's bytes to all; RuntimeError when a member has died or takes too long."""
        for piece in torch.from_numpy(data).split(PIECE):
            self._gloo.broadcast(piece, 0).wait()

    def meet(self) -> None:
        """Wait until all have come here; RuntimeError as above."""
        self._gloo.barrier().wait()


def _joined(group: Group | None, meeting: Meeting) -> Group:
    """The group of a meeting: the one that there is, or a new one."""
    return group if group and group.meeting == meeting else Group(meeting)


class Sender(Protocol):
    """The learner's end."""

    def publish(self, policy: nn.Module, policy_version: int, dtype: torch.dtype, meeting: Meeting | None) -> Notice:
        """Have a version out, in ``dtype``; a ``meeting`` names those who wait for a broadcast."""
        ...

    def kept(self, policy_version: int) -> Weights:
        """One of the versions that are still needed, for the store."""
        ...


class Broadcast:
    """Sends every version to all who wait for it."""

    def __init__(self, versions: int, *, threads: int) -> None:
        """The newest ``versions`` are kept."""
        self._versions, self._threads = versions, threads
        self._kept: dict[int, Weights] = {}
        self._group: Group | None = None

    def publish(self, policy: nn.Module, policy_version: int, dtype: torch.dtype, meeting: Meeting | None) -> Notice:
        """See ``Sender``; returns when all have the weights, or it is known that somebody has not."""
        weights = export_weights(policy, policy_version, dtype, threads=self._threads)
        self._kept = dict([*self._kept.items(), (policy_version, weights)][-self._versions :])
        buffer, problem = weights.buffer, ""
        assert isinstance(buffer, np.ndarray)
        if meeting:
            try:
                self._send(buffer.view(np.uint8), weights.digest, meeting)
            except GROUP_ERRORS as error:  # a peer is dead, hangs or has not come
                self._group, problem = None, str(error).partition("\n")[0]
        return Notice(weights=replace(weights, buffer=buffer[:0]), problem=problem)

    def _send(self, data: np.ndarray, found: str, meeting: Meeting) -> None:
        self._group = _joined(self._group, meeting)
        self._group.broadcast(_header(found, len(data)))
        self._group.broadcast(data)
        self._group.meet()

    def kept(self, policy_version: int) -> Weights:
        """See ``Sender``."""
        return self._kept[policy_version]


def _header(found: str, size: int) -> np.ndarray:
    """(40,) uint8: what goes before a version's bytes, its digest and how many they are."""
    return np.frombuffer(bytearray.fromhex(found) + size.to_bytes(8, "little"), dtype=np.uint8)


class OnCard:
    """Keeps versions in memory that is the same for the whole run, so that every reader opens it once.

    A version takes the place of one that nobody needs any more, which no event has to say: a reader has copied it
    before its call ends, and a version is only published when the calls for that older one have ended.
    """

    def __init__(self, versions: int) -> None:
        """The newest ``versions`` are kept."""
        self._versions, self._name = versions, uuid4().hex
        self._pieces: dict[int, Tensor] = {}
        self._lent: dict[int, Lent] = {}
        self._held: dict[int, str] = {}

    def publish(self, policy: nn.Module, policy_version: int, dtype: torch.dtype, meeting: Meeting | None) -> Notice:
        """See ``Sender``."""
        number, device = policy_version % self._versions, next(policy.parameters()).device
        if number not in self._pieces:
            self._pieces[number] = empty_flat(policy, dtype, device)
            self._lent[number] = lend(self._pieces[number])
        flat = self._pieces[number]
        fill_flat(flat, policy, whole)
        self._held[number] = found = digest(flat, policy_version)  # which waits until all of it is written
        return Notice(
            weights=Weights(buffer=np.empty(0), policy_version=policy_version, digest=found),
            lent=self._lent[number],
            place=(self._name, number),
        )

    def kept(self, policy_version: int) -> Weights:
        """See ``Sender``."""
        number = policy_version % self._versions
        flat = self._pieces[number].cpu()
        assert self._held[number] == digest(flat, policy_version), f"version {policy_version} is kept no longer"
        buffer = as_buffer(flat)
        return Weights(buffer=buffer, policy_version=policy_version, digest=digest(buffer, policy_version))


def make_sender(versions: int, device: torch.device, *, threads: int) -> Sender | None:
    """What a learner on a device sends by, keeping the newest ``versions``; None for 0, as the store needs nothing."""
    if not versions:
        return None
    return OnCard(versions) if device.type == "cuda" else Broadcast(versions, threads=threads)


class Inlet:
    """A worker's end: a buffer for what is broadcast, and the learner's memory where both are on one card."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._group: Group | None = None
        self._arrived = np.empty(0, dtype=np.uint8)
        self._digest = ""
        self._lock = Lock()
        self._opened: dict[tuple[str, int], Tensor | None] = {}

    def receive(self, meeting: Meeting) -> None:
        """Take part in a broadcast; beside other work.  Where it fails, nothing has come."""
        with self._lock:
            self._digest = ""
            try:
                self._group = _joined(self._group, meeting)
                found = self._listen(self._group)
                self._group.meet()
            except GROUP_ERRORS:  # as at the sender's, whose notice says so
                self._group = None
            else:
                self._digest = found

    def _listen(self, group: Group) -> str:
        """Fill the buffer; the digest of what the sender has sent."""
        header = _header("00" * 32, 0)
        group.broadcast(header)
        found, size = header[:32].tobytes().hex(), int.from_bytes(header[32:].tobytes(), "little")
        if len(self._arrived) != size:
            self._arrived = np.empty(size, dtype=np.uint8)
        group.broadcast(self._arrived)
        return found

    @contextmanager
    def found(self, notice: Notice) -> Iterator[Weights | None]:
        """The weights that a notice is of, as they were sent; None where they have not come.

        Nothing new arrives meanwhile.
        """
        weights = notice.weights
        if notice.lent:
            flat = self._open(notice.lent, notice.place)
            yield None if flat is None else replace(weights, buffer=flat)
            return
        with self._lock:
            assert isinstance(weights.buffer, np.ndarray)
            here = self._digest == weights.digest
            yield replace(weights, buffer=self._arrived.view(weights.buffer.dtype)) if here else None

    def _open(self, lent: Lent, place: tuple[str, int]) -> Tensor | None:
        """The learner's memory, on the card that both share; it is tried once and opened once."""
        if place not in self._opened:
            whose, _ = place
            self._opened = {known: flat for known, flat in self._opened.items() if known[0] == whose}
            self._opened[place] = borrow(lent, self._device, otherwise="weights go through the store")
        return self._opened[place]
