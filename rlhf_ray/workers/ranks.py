"""Several learners that work as one: how they meet, which rows are whose, and what they add up.

Every rank is given the same calls with the same arguments, in the same order, takes its own rows of every mini-batch
and adds up gradients and metrics with the others.  Losses divide by what the whole mini-batch counts, so neither the
number of ranks nor the size of a micro-batch changes the gradient.  One rank alone exchanges nothing.

Left out on purpose: overlap of exchange and backward pass, and what happens when a rank dies (``runtime/``).
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_ray.models.scoring import row_ranges
from rlhf_ray.types import Experience, Rollout, columns, select

INTERFACE = "GLOO_SOCKET_IFNAME"
"""Names the interface that gloo listens on; by itself it takes the address of the host's name, which on many machines
other ones can't reach."""
SIOCGIFADDR = 0x8915
"""Linux's request for the IPv4 address of an interface."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where one rank finds the others."""

    host: str
    port: int
    """Of the store that ``open_store`` has opened."""
    rank: int
    size: int
    timeout: float
    """Seconds for all to come, and for each exchange."""
    name: str = ""
    """Tells groups apart that meet at one store."""


def open_store(host: str) -> dist.TCPStore:
    """A store for ranks to meet at, on a free ``port`` of one address of this node; open as long as it is held."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among the ranks of a group; by default it is alone."""

    rank: int = 0
    size: int = 1
    neighbours: int = 1
    """Ranks on this node, this one included."""

    @classmethod
    def join(cls, meeting: Meeting, device: torch.device) -> Ranks:
        """Wait for the other ranks, and be one of them from now on: over NCCL on GPUs, over gloo on CPUs."""
        backend = "nccl" if device.type == "cuda" else "gloo"
        if backend == "gloo":
            name_interface(meeting)
        timeout = timedelta(seconds=meeting.timeout)
        store = dist.TCPStore(meeting.host, meeting.port, timeout=timeout)
        store.set(f"node {meeting.rank}", socket.gethostname())
        nodes = [store.get(f"node {rank}") for rank in range(meeting.size)]
        dist.init_process_group(backend, store=store, rank=meeting.rank, world_size=meeting.size, timeout=timeout)
        return cls(rank=meeting.rank, size=meeting.size, neighbours=nodes.count(nodes[meeting.rank]))

    @property
    def first(self) -> bool:
        """Whether this is the rank that answers and writes."""
        return self.rank == 0

    def micro_batches(self, batch: Rollout | Experience, size: int, tokens: int) -> Iterator[tuple[Tensor, Any]]:
        """This rank's rows of a batch, cut by ``row_ranges``: their numbers (b,) and the rows, without needless
        columns.

        Every rank yields equally many, because sharded weights are put together by all ranks at once: one that has
        no more rows yields a row without a response to learn from, and no number.
        """
        lengths = _rollout(batch).attention_mask.sum(1)  # (B,)
        shares = [self._cut(lengths, rank, size, tokens) for rank in range(self.size)]
        own = shares[self.rank]
        for rows in own:
            yield rows, columns(select(batch, rows), slice(int(lengths[rows].max())))
        shortest = int(lengths.argmin())
        for _ in range(max(map(len, shares)) - len(own)):
            filler = columns(select(batch, slice(shortest, shortest + 1)), slice(int(lengths[shortest])))
            yield torch.empty(0, dtype=torch.int64), _without_response(filler)

    def _cut(self, lengths: Tensor, rank: int, size: int, tokens: int) -> list[Tensor]:
        """Numbers of a rank's rows, a micro-batch each; by length, every size-th row is one rank's."""
        rows = lengths.argsort(stable=True)[rank :: self.size].sort().values
        return [rows[cut] for cut in row_ranges(lengths[rows], size, tokens)] if len(rows) else []

    def sum(self, x: Tensor) -> Tensor:
        """Add a tensor up over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add whole gradients up over the ranks, in one message."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def gather(self, numbers: Sequence[float], device: torch.device) -> Tensor:
        """(ranks, n) float64 on the CPU: the numbers (n,) of every rank."""
        own = torch.tensor(numbers, dtype=torch.float64, device=device)
        if self.size == 1:
            return own[None].cpu()
        table = own.new_empty(self.size, len(numbers))
        dist.all_gather(list(table.unbind()), own)
        return table.cpu()

    def same(self, x: Tensor) -> Tensor:
        """The first rank's x: ranks that round differently, on another device or thread count, would drift apart."""
        if self.size > 1:
            dist.broadcast(x, 0)
        return x


def name_interface(meeting: Meeting) -> None:
    """Have gloo listen where a meeting's store is reached, unless the environment names an interface."""
    if sys.platform == "linux" and INTERFACE not in os.environ:
        os.environ[INTERFACE] = _interface_toward(meeting.host, meeting.port)


def _interface_toward(host: str, port: int) -> str:
    """The network interface through which this node reaches a store."""
    with socket.create_connection((host, port)) as connection:
        own = connection.getsockname()[0]
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # one without an address
                found = fcntl.ioctl(connection, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == own:
                    return name
    raise ValueError(
        f"no network interface has the address {own}: name the one that learners are to use in {INTERFACE}"
    )


def _rollout(batch: Rollout | Experience) -> Rollout:
    return batch if isinstance(batch, Rollout) else batch.rollout


def _without_response(batch: Any) -> Any:
    """The same rows with an empty response mask."""
    if isinstance(batch, Rollout):
        return replace(batch, response_mask=torch.zeros_like(batch.response_mask))
    return replace(batch, rollout=_without_response(batch.rollout))
