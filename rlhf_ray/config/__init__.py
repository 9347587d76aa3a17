"""Typed configuration: defaults < YAML < command line, one class a stage."""

from rlhf_ray.config.loader import Config, ConfigError, load, repository_path
from rlhf_ray.config.lora import LoRA
from rlhf_ray.config.memory import Memory
from rlhf_ray.config.ppo import KL, PPO, Generation, PPOConfig, RewardSource
from rlhf_ray.config.stages import (
    ChatConfig,
    EvaluateConfig,
    GrowConfig,
    MonitorConfig,
    Optimiser,
    PipelineConfig,
    PretrainConfig,
    RewardModelConfig,
    SFTConfig,
    TokenizerConfig,
    TrainConfig,
)

__all__ = [
    "KL",
    "PPO",
    "ChatConfig",
    "Config",
    "ConfigError",
    "EvaluateConfig",
    "Generation",
    "GrowConfig",
    "LoRA",
    "Memory",
    "MonitorConfig",
    "Optimiser",
    "PPOConfig",
    "PipelineConfig",
    "PretrainConfig",
    "RewardModelConfig",
    "RewardSource",
    "SFTConfig",
    "TokenizerConfig",
    "TrainConfig",
    "load",
    "repository_path",
]
