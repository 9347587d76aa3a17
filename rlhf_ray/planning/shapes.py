"""The shapes of a run's models: from their folders or, where those are not there yet, from what they are called.

Left out on purpose: weights, which nothing here opens.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.config import PPOConfig, RewardSource
from rlhf_ray.models.adapter_folders import Base, base_folder
from rlhf_ray.models.folders import has_model, model_folder
from rlhf_ray.models.gpt2 import PRESETS, GPT2Config, preset
from rlhf_ray.models.hf_weights import read_config
from rlhf_ray.planning.roles import Models

NAMES = {name: name for name in PRESETS} | {
    "gpt2": "small",
    "gpt2-medium": "medium",
    "gpt2-large": "large",
    "gpt2-xl": "xl",
}
"""Shape by the name of a folder: our presets', and GPT-2's own."""
GPT2_VOCABULARY = 50264
"""GPT-2's tokens and our seven special ones."""


def models_of(
    config: PPOConfig, *, named: str | None = None, default: str = "tiny", base: Base | None = None
) -> Models:
    """The shapes of policy, reward models and critic; ``named`` is a preset that all of them have instead, ``default``
    the one that default folders are trained with where they are not there.  ``base`` is the policy below adapters,
    where it is known by more than its folder's name.

    ValueError naming the field when a folder neither holds a model nor is called like one.
    """
    if named:
        shape = preset(named, GPT2_VOCABULARY)
        models = [shape for source in config.reward_sources if source.kind == "model"]
        critic = shape if models or config.critic_init else None
        return Models(policy=shape, rewards=tuple(models), critic=critic, over=(False,) * len(models))
    sources: list[RewardSource] = [source for source in config.reward_sources if source.kind == "model"]
    rewards = tuple(_shape(source.source, "rewards.source", default) for source in sources)
    critic = _shape(config.critic_init, "critic_init", default) if config.critic_init else next(iter(rewards), None)
    over = tuple(_is_over(source.source, config.policy, base) for source in sources)
    begun = _is_over(config.critic_init, config.policy, base) if config.critic_init else next(iter(over), False)
    policy = _shape(config.policy, "policy", default)
    return Models(policy=policy, rewards=rewards, critic=critic, over=over, critic_over=begun)


def _is_over(path: str | Path, policy: Path, base: Base | None) -> bool:
    """Whether a reward model is adapters over the policy: by the digest where that is known, else by the folder."""
    if not (has_model(path) and has_model(policy)):
        return False
    folder = model_folder(path)
    return base.is_under(folder) if base else base_folder(folder) == model_folder(policy)


def _shape(path: str | Path, field: str, default: str) -> GPT2Config:
    """A folder's shape, or that of its name."""
    if has_model(path):
        return read_config(model_folder(path, field=field))
    name = Path(path).name
    known = default if name == "default" else NAMES.get(name)
    if known is None:
        raise ValueError(
            f"{field} = {path}: there is no model, and the folder is not called like one ({', '.join(NAMES)}): name "
            "another folder, or give --preset"
        )
    return preset(known, GPT2_VOCABULARY)
