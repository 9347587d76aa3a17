"""A worker that leaves the other processes on its card what is theirs."""

from __future__ import annotations

from typing import Any

import torch


def within(worker_class: type[Any], limit: int, **arguments: Any) -> Any:
    """Build a worker in whose process torch takes at most ``limit`` bytes of a GPU; one on a CPU knows no limit."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    return worker_class(**arguments)
