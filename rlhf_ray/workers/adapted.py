"""A learner's policy in a checkpoint: a model folder that opens everywhere, and what a resumed run goes on with.

Where every weight learns both are one.  With adapters (``models/lora.py``) the folder's model is merged, which rounds;
the adapters are beside it, exactly, and the weights under them are those that the run began with, or it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from rlhf_ray.checkpoint import load_tree
from rlhf_ray.config import LoRA
from rlhf_ray.models import GPT2
from rlhf_ray.models.adapter_folders import ADAPTER, Base, check_bases, load_adapter, save_adapter, save_bases
from rlhf_ray.models.hf_weights import WEIGHTS, load_policy, save_policy
from rlhf_ray.models.lora import learned_state, merged
from rlhf_ray.rundir.fit import check_module
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
        _take(policy, load_policy(folder).state_dict(), folder / WEIGHTS)


def take_learned(module: nn.Module, path: Path) -> None:
    """Take over what ``learned_state`` gave of a module; CheckpointError when it does not fit."""
    own = module.state_dict()
    frozen = {name: own[name] for name in own.keys() - learned_state(module).keys()}
    _take(module, {**frozen, **load_tree(path)}, path.with_suffix(".safetensors"))


def _take(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    check_module(module, state, path)
    load_whole(module, state)
