"""Policy and critic from their folders, as the learner's process builds them.

With adapters, what the folders hold is frozen, and kept in as few bits as asked for; a critic that starts from the
policy, or from a reward model that is adapters over it, then shares its weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rlhf_ray.config import LoRA
from rlhf_ray.models import GPT2
from rlhf_ray.models.adapter_folders import Base, reward_model_over
from rlhf_ray.models.gpt2 import checkpoint_blocks, compile_blocks
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.hf_weights import load_policy, load_reward_model
from rlhf_ray.models.lora import with_adapters
from rlhf_ray.models.shared_base import FrozenBase
from rlhf_ray.workers.adapted import Adapters
from rlhf_ray.workers.policy_critic import PolicyCritic, SeparateCritic, SharedCritic


def build_policy_critic(
    kind: str,
    policy_folder: Path,
    critic_folder: Path | None,
    *,
    temperature: float,
    device: str,
    dtype: torch.dtype,
    special: dict[str, int],
    compiled: bool,
    checkpointing: bool,
    lora: LoRA,
    base: FrozenBase | None,
    seed: int,
) -> PolicyCritic:
    """Policy and critic, in float32 where they learn; without a critic folder the critic starts from the policy.

    Where a ``lora`` learns, over the policy that is its ``base``, the adapters follow from ``seed``.
    """
    if base is None:
        policy, adapters = load_policy(policy_folder, device=device).eval(), None
    else:
        opened = base.open(device)
        policy = with_adapters(opened, lora, seed=seed)
        adapters = Adapters(lora=lora, base=opened, bases={"policy": base.base})
    _set_up(policy, compiled=compiled, checkpointing=checkpointing)
    if kind == "shared":
        return SharedCritic(policy, temperature=temperature, dtype=dtype, special=special, adapters=adapters)
    assert kind == "separate", kind
    critic = _critic(policy_folder, critic_folder, device=device, adapters=adapters)
    if adapters:
        critic.trunk = with_adapters(critic.trunk, lora, seed=seed)
        if critic_folder is not None:
            adapters.bases["critic"] = Base.of(critic_folder)
    _set_up(critic, compiled=compiled, checkpointing=checkpointing)
    return SeparateCritic(
        policy,
        critic.eval(),
        temperature=temperature,
        dtype=dtype,
        special=special,
        adapters=adapters,
        compiled=compiled,
    )


def _critic(policy_folder: Path, critic_folder: Path | None, *, device: str, adapters: Adapters | None) -> ValueModel:
    """The critic before it has learned anything, and before it is adapted."""
    if critic_folder is not None and adapters and adapters.bases["policy"].is_under(critic_folder):
        return reward_model_over(adapters.base, critic_folder)
    if critic_folder is not None:
        kept = adapters.bases["policy"].frozen if adapters else "float32"
        return load_reward_model(critic_folder, device=device, frozen=kept)
    trunk: GPT2 = adapters.base if adapters else load_policy(policy_folder, device=device)
    critic = ValueModel(trunk)
    nn.init.zeros_(critic.score.weight)
    return critic


def _set_up(module: nn.Module, *, compiled: bool, checkpointing: bool) -> None:
    if compiled:
        compile_blocks(module)
    if checkpointing:
        checkpoint_blocks(module)
