"""What Ray Train minimises; a new objective is one file and one line in OBJECTIVES."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf_ray.objectives.base import Batch, Dataset, Objective, Report
from rlhf_ray.objectives.language_model import LanguageModel
from rlhf_ray.objectives.reward_model import RewardModel
from rlhf_ray.objectives.sft import SFT

OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "language_model": LanguageModel,
    "sft": SFT,
    "reward_model": RewardModel,
}

__all__ = ["OBJECTIVES", "Batch", "Dataset", "Objective", "Report"]
