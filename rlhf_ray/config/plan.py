"""The configuration of ``launch/plan.py``: that of the run which is planned, and what is not known of its models."""

from __future__ import annotations

from pydantic import Field

from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.stages import Preset


class PlanConfig(PPOConfig):
    """What a PPO run would need of memory."""

    preset: Preset | None = None
    """Shape of policy, critic and reward model, with GPT-2's vocabulary; unset takes that of their folders or, where
    these are not there, the one that a folder is called by."""
    all: bool = Field(False)
    """Plan every shipped preset for a GPU, on cards of 4 to 24 GB."""
