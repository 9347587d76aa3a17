"""Where scores come from: a trained model, Python functions, a server; several are summed with weights."""

from collections.abc import Callable

from rlhf_ray.config import RewardSource
from rlhf_ray.rewards.base import RewardContext, RewardFunction
from rlhf_ray.rewards.function import FunctionReward
from rlhf_ray.rewards.http import HTTPReward
from rlhf_ray.rewards.model import ModelReward, reward_model_folder

REWARDS: dict[str, Callable[[RewardSource, RewardContext], RewardFunction]] = {
    "model": ModelReward,
    "function": FunctionReward,
    "http": HTTPReward,
}

__all__ = ["REWARDS", "RewardContext", "RewardFunction", "reward_model_folder"]
