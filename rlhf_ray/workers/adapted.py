"""A learner's policy in a checkpoint: a model folder that opens everywhere, and what a resumed run goes on with.

Where every weight learns both are one.  With adapters (``models/lora.py``) the folder's model is merged, which rounds;
the adapters are beside it, exactly, and the weights under them are those that the run began with, or it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from rlhf_ray.checkpoint import load_tree
from rlhf_ray.config import LoRA
from rlhf_ray.models import GPT2
from rlhf_ray.models.adapter_folders import ADAPTER, Base, check_bases, load_adapter, save_adapter, save_bases
from rlhf_ray.models.hf_weights import WEIGHTS, load_policy, save_policy
from rlhf_ray.models.lora import learned_state, merged
from rlhf_ray.rundir.fit import check_module, check_tensors
from rlhf_ray.workers.sharding import load_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """How a policy and its critic are adapted."""

    lora: LoRA
    base: GPT2
    """The policy without its adapters: the reference."""
    bases: dict[str, Base]
    """The frozen weights of ``policy`` and, where it has any of its own, ``critic``."""


def save_learned_policy(policy: GPT2, adapters: Adapters | None, folder: Path, special: Mapping[str, int]) -> None:
    """Write the policy as a Hugging Face folder, its adapters inside it as a PEFT folder."""
    save_policy(merged(policy), folder, **special)
    if adapters:
        save_adapter(policy, folder / ADAPTER, adapters.lora, adapters.bases["policy"])
        save_bases(folder, adapters.bases)


def load_learned_policy(policy: GPT2, adapters: Adapters | None, folder: Path) -> None:
    """Take over what ``save_learned_policy`` wrote; CheckpointError when it does not fit."""
    if adapters:
        check_bases(folder, adapters.bases)
        load_adapter(policy, folder / ADAPTER)
    else:
        state = load_policy(folder).state_dict()
        check_module(policy, state, folder / WEIGHTS)
        load_whole(policy, state)


def take_learned(module: nn.Module, path: Path) -> None:
    """Take over what ``learned_state`` gave of a module; CheckpointError when it does not fit."""
    state = load_tree(path)
    check_tensors(learned_state(module), state, path.with_suffix(".safetensors"))
    load_whole(module, state)
