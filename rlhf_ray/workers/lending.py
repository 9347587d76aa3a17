"""Memory of a card that one process lends to others on it, by CUDA IPC.

Whoever borrows reads what the lender has written; it must not read on when the lender is no more.

Left out on purpose: who tells whom that something is lent; what is lent, and when it may change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from rlhf_ray import console
from rlhf_ray.models import GPT2
from rlhf_ray.models.shared_base import memory_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Lent:
    """What another process needs to open a tensor."""

    card: str
    """Whose memory it is in."""
    opening: tuple[Callable[..., Tensor], tuple[Any, ...]]
    """A function and its arguments that open it."""


def lend(x: Tensor) -> Lent:
    """Offer a tensor that stays where it is as long as anybody may borrow it."""
    return Lent(card=card_of(x.device), opening=reduce_tensor(x))


def lend_model(base: GPT2) -> Lent | None:
    """Offer an opened base; None where it is on a CPU, or in more than one piece."""
    memory = memory_of(base)
    return lend(memory) if memory is not None and memory.is_cuda else None


def borrow(lent: Lent, device: torch.device, *, otherwise: str) -> Tensor | None:
    """The tensor; None on another card, and where the system forbids it, which says what is done ``otherwise``."""
    if lent.card != card_of(device):
        return None
    function, arguments = lent.opening
    try:
        return function(*arguments)
    except RuntimeError as error:  # as under WSL, or in containers that share no memory
        console.say(f"another process's memory on {device} can't be read; {otherwise}: {error}")
        return None


def card_of(device: torch.device) -> str:
    """The name of a GPU, which is another one's nowhere in the world; that of a CPU is the same everywhere."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type
