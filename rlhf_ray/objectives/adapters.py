"""What an objective does differently where adapters learn instead of the weights (``models/lora.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from rlhf_ray.config import LoRA, RewardModelConfig, SFTConfig
from rlhf_ray.models import GPT2, ValueModel
from rlhf_ray.models.adapter_folders import ADAPTER, Base, check_bases, load_adapter, save_adapter, save_bases
from rlhf_ray.models.hf_weights import load_policy, read_config
from rlhf_ray.models.lora import with_adapters
from rlhf_ray.tokenizer import Tokenizer


@dataclass(frozen=True)
class Adapted:
    """A policy whose adapters are trained."""

    lora: LoRA
    folder: Path
    """Of the policy."""
    frozen: str
    """How its weights are kept."""
    seed: int

    @cached_property
    def base(self) -> Base:
        """What is under the adapters."""
        return Base.of(self.folder, frozen=self.frozen)

    def build(self, device: torch.device) -> GPT2:
        """The policy with new adapters."""
        base = load_policy(self.folder, device=device, frozen=self.frozen)
        return with_adapters(base, self.lora, seed=self.seed)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the adapters, and a reward model's score, into a model's folder, whose own weights are merged."""
        assert isinstance(model, GPT2 | ValueModel)
        save_adapter(model, folder / ADAPTER, self.lora, self.base)
        save_bases(folder, {"policy": self.base})

    def load(self, model: nn.Module, folder: Path) -> None:
        """Take over what ``save`` wrote, exactly; CheckpointError when it belongs to other weights."""
        assert isinstance(model, GPT2 | ValueModel)
        check_bases(folder, {"policy": self.base})
        load_adapter(model, folder / ADAPTER)


def adapters_of(config: SFTConfig | RewardModelConfig, folder: Path, tokenizer: Tokenizer) -> Adapted | None:
    """The adapters that a configuration asks for, of the policy in a folder.

    ValueError when the policy's embedding has to grow, whose rows adapters can not teach.
    """
    if not config.lora.rank:
        return None
    rows = read_config(folder).vocab_size
    if rows != tokenizer.vocab_size:
        raise ValueError(
            f"lora.rank = {config.lora.rank}: the embedding of policy = {config.policy} has {rows} rows, the "
            f"vocabulary {tokenizer.vocab_size} tokens with the special ones, and adapters do not train embeddings: "
            f"python launch/grow.py --policy {config.policy} --output FOLDER writes one that has them"
        )
    return Adapted(lora=config.lora, folder=folder, frozen=config.memory.frozen, seed=config.seed)
