"""The shapes of a run's models: from their folders or, where those are not there yet, from what they are called.

Left out on purpose: weights, which nothing here opens.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.config import PPOConfig, RewardSource
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


def models_of(config: PPOConfig, *, named: str | None = None, default: str = "tiny") -> Models:
    """The shapes of policy, reward models and critic; ``named`` is a preset that all of them have instead, ``default``
    the one that default folders are trained with where they are not there.

    ValueError naming the field when a folder neither holds a model nor is called like one.
    """
    if named:
        shape = preset(named, GPT2_VOCABULARY)
        models = [shape for source in config.reward_sources if source.kind == "model"]
        return Models(policy=shape, rewards=tuple(models), critic=shape if models or config.critic_init else None)
    sources: list[RewardSource] = [source for source in config.reward_sources if source.kind == "model"]
    rewards = tuple(_shape(source.source, "rewards.source", default) for source in sources)
    critic = _shape(config.critic_init, "critic_init", default) if config.critic_init else next(iter(rewards), None)
    return Models(policy=_shape(config.policy, "policy", default), rewards=rewards, critic=critic)


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
