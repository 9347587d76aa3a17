"""The loops of reinforcement learning from human feedback."""

from rlhf_ray.algorithms import ppo

ALGORITHMS = {"ppo": ppo.train}

__all__ = ["ALGORITHMS"]
