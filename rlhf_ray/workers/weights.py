"""A policy's weights on their way from the learner to the rollout workers: one flat buffer, a version, a digest."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from rlhf_ray.models import GPT2
from rlhf_ray.models.flat import flat_weights, load_flat_weights
from rlhf_ray.types import Weights


def _digest(buffer: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(buffer).data).hexdigest()


def export_weights(policy: GPT2, policy_version: int, dtype: torch.dtype) -> Weights:
    """The policy's parameters in ``dtype``, as one buffer."""
    buffer = flat_weights(policy, dtype=dtype)
    return Weights(buffer=buffer, policy_version=policy_version, sha256=_digest(buffer))


def import_weights(policy: GPT2, weights: Weights) -> None:
    """Copy a buffer into the policy; AssertionError when its bytes are not those that were sent."""
    assert _digest(weights.buffer) == weights.sha256, (
        f"policy version {weights.policy_version} arrived altered: its digest differs from the sender's"
    )
    load_flat_weights(policy, weights.buffer)
