"""What a PPO run reads before it starts anything, checked: a mistake costs seconds here and minutes later."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf_ray.config import PPOConfig, repository_path
from rlhf_ray.data.prompt_set import PromptSet, tokenise_prompts
from rlhf_ray.data.readers import read_prompts
from rlhf_ray.functions import load_function
from rlhf_ray.generation.load import find_device, recorded_template
from rlhf_ray.models.adapter_folders import Base
from rlhf_ray.models.folders import model_folder
from rlhf_ray.models.hf_weights import read_config
from rlhf_ray.models.shared_base import FrozenBase
from rlhf_ray.rewards import reward_model_folder
from rlhf_ray.tokenizer import TEMPLATES, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a PPO run reads before it starts anything."""

    policy: Path
    """Hugging Face folder of the SFT policy."""
    tokenizer: Tokenizer
    prompts: PromptSet
    """What is trained on."""
    probes: PromptSet
    """Prompts that only show what changes."""
    critic_init: Path | None
    """Reward model that the critic starts from; None starts it from the policy."""
    device: str
    base: FrozenBase | None
    """The policy below adapters, where these learn."""

    @property
    def all_prompts(self) -> PromptSet:
        """What the workers hold: the prompts and, behind them, the probes."""
        return self.prompts + self.probes


def read_inputs(config: PPOConfig) -> Inputs:
    """Read and check prompts, vocabulary and model shapes; ValueError names the field that is wrong."""
    policy = model_folder(config.policy, field="policy")
    tokenizer = Tokenizer.load(policy)
    shape = read_config(policy)
    if shape.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"policy = {config.policy}: the model has {shape.vocab_size} tokens and its vocabulary "
            f"{tokenizer.vocab_size} (special tokens included); copy the files it was trained with"
        )
    template = recorded_template(policy)
    if template and template != config.template:
        raise ValueError(f"template = {config.template}: the policy was trained with the template {template}")
    longest = row_length(config)
    if longest > shape.n_positions:
        raise ValueError(
            f"generation.prompt_length + generation.response_length = {longest} exceeds the model's context of "
            f"{shape.n_positions} tokens"
        )
    prompts = _read_prompts(config, config.prompts, tokenizer)
    probes = prompts if config.probe_prompts is None else _read_prompts(config, config.probe_prompts, tokenizer)
    return Inputs(
        policy=policy,
        tokenizer=tokenizer,
        prompts=prompts,
        probes=probes.spread(config.probes),
        critic_init=_critic_init(config, tokenizer),
        device=find_device(config.device).type,
        base=_base(config, policy),
    )


def _base(config: PPOConfig, policy: Path) -> FrozenBase | None:
    if not config.lora.rank:
        return None
    return FrozenBase(base=Base.of(policy, frozen=config.memory.frozen), shared=config.memory.share_base)


def _read_prompts(config: PPOConfig, path: Path, tokenizer: Tokenizer) -> PromptSet:
    return tokenise_prompts(
        read_prompts(repository_path(path), config.max_bad_rows),
        tokenizer,
        TEMPLATES[config.template],
        max_length=config.generation.prompt_length,
        long_prompts=config.generation.long_prompts,
    )


def row_length(config: PPOConfig) -> int:
    """Tokens of the longest row that a step can have."""
    return config.generation.prompt_length + config.generation.response_length


def _critic_init(config: PPOConfig, tokenizer: Tokenizer) -> Path | None:
    """The reward model that the critic starts from, once every source of reward is known to be there."""
    if not config.reward_sources:
        raise ValueError("rewards is empty: give --reward path/to/file.py:function, a URL or a reward model's folder")
    fits = partial(reward_model_folder, tokenizer=tokenizer, length=row_length(config))
    models = [fits(s.source, field="rewards.source") for s in config.reward_sources if s.kind == "model"]
    for source in config.reward_sources:
        if source.kind == "function":
            load_function(source.source, field="reward")
    if config.critic_init is not None:
        return fits(config.critic_init, field="critic_init")
    return models[0] if models else None
