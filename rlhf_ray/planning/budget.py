"""How much memory there is: of the card, as its driver says, or of the host.

Nothing here makes a CUDA context, which would itself take some hundred megabytes of what is asked about.

Left out on purpose: several cards, and cards of other makers.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from rlhf_ray.config import PPOConfig
from rlhf_ray.config.amounts import in_bytes
from rlhf_ray.planning.needs import MIB, Device

MARGIN = 0.03
"""Of a card's memory that is left alone, of what is free."""
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""What a container may take, where it runs under either version of control groups."""


def budget(config: PPOConfig, device: Device) -> tuple[int, str]:
    """Bytes that a run may take of a device's memory, and whose they are, as after a number."""
    given = config.gpu_memory if device == "cuda" else config.host_memory
    name = "gpu_memory" if device == "cuda" else "host_memory"
    if given:
        return in_bytes(given), f"and {name} is {given}"
    if device == "cpu":
        there = host_memory()
        return there, f"and this machine has {there / 1e9:.1f} GB"
    total, free = card_memory()
    there = free - int(MARGIN * total)
    return there, f"and of the card's {total / 1e9:.1f} GB {there / 1e9:.1f} GB can be used"


def host_memory() -> int:
    """Bytes of this machine, or of the container that this process is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [file.read_text(encoding="ascii").strip() for file in LIMITS if file.is_file()]
    return min([total, *(int(limit) for limit in limits if limit.isdecimal())])


def card_memory() -> tuple[int, int]:
    """Bytes of this process's first card: all, and those that are free; ValueError when its driver does not say."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={visible}", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        total, free = (int(number) * MIB for number in said.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise ValueError(
            "gpu_memory is not given and nvidia-smi does not say what the card has: give it, such as --gpu-memory 6GB"
        ) from error
    return total, free
