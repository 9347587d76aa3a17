"""A policy's weights on their way from the learner to the rollout workers: one flat buffer, a version, a digest.

The digest guards against accidents: a flipped bit, a missing or repeated part, another version's bytes.  It is the
SHA-256 of the CRC-32s of all chunks, because SHA-256 of everything takes ten times as long as copying it.  A CRC-32
finds one or two flipped bits in its chunk, and any burst of 32, for certain, and anything else but once in 2**32.

Left out on purpose: guarding against an attacker, who could as well send a digest of his own.
"""

from __future__ import annotations

import hashlib
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from rlhf_ray.models import GPT2
from rlhf_ray.models.flat import flat_weights, load_flat_weights
from rlhf_ray.types import Weights
from rlhf_ray.workers.sharding import whole

CHUNK = 1 << 22
"""Bytes that one CRC-32 covers."""


def digest(buffer: np.ndarray, policy_version: int, *, threads: int = 1) -> str:
    """A buffer's and its version's digest, in hexadecimal, the same for any number of threads."""
    data = buffer.view(np.uint8).data
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    with ThreadPoolExecutor(threads) as pool:
        sums = list(pool.map(zlib.crc32, chunks))  # which lets go of the interpreter's lock
    return hashlib.sha256(np.array([policy_version, len(data), *sums], dtype="<i8").data).hexdigest()


def export_weights(policy: GPT2, policy_version: int, dtype: torch.dtype, *, threads: int = 1) -> Weights:
    """The policy's parameters in ``dtype``, as one buffer."""
    buffer = flat_weights(policy, dtype=dtype, read=whole)
    return Weights(buffer=buffer, policy_version=policy_version, digest=digest(buffer, policy_version, threads=threads))


def import_weights(policy: GPT2, weights: Weights, *, threads: int = 1) -> None:
    """Copy a buffer into the policy; AssertionError when its bytes or its version are not those that were sent."""
    assert digest(weights.buffer, weights.policy_version, threads=threads) == weights.digest, (
        f"policy version {weights.policy_version} arrived altered: its digest differs from the sender's"
    )
    load_flat_weights(policy, weights.buffer)
