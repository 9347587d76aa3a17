"""Two networks at once, each on half of the threads, so that a network's sums do not depend on the other.

Threads share a product of a few hundred rows of a small model badly, and the operations between the products hardly at
all; two networks that do not know of each other need no sharing.  The outputs of both are one node of the graph, whose
backward pass is again one thread for each network.

Left out on purpose: devices other than a CPU, whose queues do this by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Outputs = tuple[Tensor, ...]
Network = Callable[[], Outputs]


def beside(first: Network, second: Network) -> tuple[Outputs, Outputs]:
    """What both return, computed at once; gradients reach each one's parameters as if it had been called alone.

    They share nothing that learns.  Without gradients to come, nothing is kept for them.
    """
    pool, learning = _pool(torch.get_num_threads() // 2), torch.is_grad_enabled()

    def call(network: Network) -> Outputs:
        with torch.set_grad_enabled(learning):  # it holds for one thread
            return network()

    one, other = pool.map(call, (first, second))
    if learning:
        joined = _Join.apply(torch.zeros((), requires_grad=True), pool, one, other)
        one, other = joined[: len(one)], joined[len(one) :]
    return one, other


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, "network", initializer=_start, initargs=(threads,))


def _start(threads: int) -> None:
    torch.get_num_threads()  # a thread's first question sets its count to the process's, which the next line replaces
    torch.set_num_threads(threads)


class _Join(torch.autograd.Function):
    """The outputs of two graphs, each of which goes back in its own thread."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, pool: ThreadPoolExecutor, one: Outputs, other: Outputs) -> Outputs:
        ctx.pool, ctx.graphs = pool, (one, other)
        return tuple(x.detach() for x in (*one, *other))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        (one, other), ctx.graphs = ctx.graphs, None
        parts = gradients[: len(one)], gradients[len(one) :]
        list(ctx.pool.map(torch.autograd.backward, (one, other), parts))
        return None, None, None, None
