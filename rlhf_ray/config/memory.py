"""What a run does to need less memory; docs/MEMORY.md says what each saves and costs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from rlhf_ray.config.loader import Section


def _number(given: object) -> object:
    """A whole number that a command line writes as text."""
    return int(given) if isinstance(given, str) and given.isdecimal() else given


class Memory(Section):
    """Savers of memory; those that cost something are off."""

    activation_checkpointing: bool = False
    """Compute every block's forward pass again in the backward pass instead of keeping what it made: a third more
    work, the same gradients."""
    optimizer_bits: Annotated[Literal[32, 8], BeforeValidator(_number)] = 32
    """Bits of each of AdamW's two moments; 8 keeps them in blocks of 256 with a scale each."""
    offload_optimizer: bool = False
    """Keep AdamW's moments in host memory but for the moment of a step, where training is on a GPU."""
    frozen: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    """Storage of the weights that never learn: those of reference and reward model, and the base of a LoRA run. The KL
    is measured from the reference as it is kept."""
    share_base: bool = True
    """In PPO with adapters all processes of a machine, or on a card, read one copy of the weights below them."""
    sleep: bool = False
    """Roles give back, while they are idle, what they can make again: what their allocators keep and, unless
    max_staleness keeps it busy, generation's cache."""
