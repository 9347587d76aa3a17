"""A policy's weights on their way from the learner to the rollout workers: one flat buffer, a version, a digest.

The digest guards against accidents: a flipped bit, a missing or repeated part, another version's bytes.  It is the
SHA-256 of the CRC-32s of all chunks, because SHA-256 of everything takes ten times as long as copying it.  A CRC-32
finds one or two flipped bits in its chunk, and any burst of 32, for certain, and anything else but once in 2**32.
Of weights that stay on a card it is the SHA-256 of two sums a chunk, which the card takes: of all words, and of all
words times odd numbers that grow.  Exact in 64 bits, they find any one altered word and any two exchanged for certain.

Left out on purpose: guarding against an attacker, who could as well send a digest of his own.
"""

from __future__ import annotations

import hashlib
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_ray.models.flat import flat_weights, load_flat_weights
from rlhf_ray.types import Weights
from rlhf_ray.workers.sharding import whole

CHUNK = 1 << 22
"""Bytes that one CRC-32, or one pair of sums, covers."""


def digest(buffer: np.ndarray | Tensor, policy_version: int, *, threads: int = 1) -> str:
    """A buffer's and its version's digest, in hexadecimal, the same for any number of threads."""
    sums = _sums(buffer) if isinstance(buffer, Tensor) else _checksums(buffer, threads)
    return hashlib.sha256(np.array([policy_version, buffer.nbytes, *sums], dtype="<i8").data).hexdigest()


def _checksums(buffer: np.ndarray, threads: int) -> list[int]:
    """The CRC-32 of every chunk."""
    data = buffer.view(np.uint8).data
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(zlib.crc32, chunks))  # which lets go of the interpreter's lock


def _sums(flat: Tensor) -> list[int]:
    """Two sums of every chunk, modulo 2**64, taken where the tensor is."""
    words = flat.view({2: torch.int16, 4: torch.int32}[flat.itemsize])
    chunks = words.split(CHUNK // flat.itemsize)
    odd = torch.arange(1, 2 * len(chunks[0]), 2, device=flat.device)  # (n,) int64
    sums = [torch.stack([chunk.sum(), (chunk * odd[: len(chunk)]).sum()]) for chunk in chunks]  # in int64
    return torch.cat(sums).tolist()


def export_weights(policy: nn.Module, policy_version: int, dtype: torch.dtype, *, threads: int = 1) -> Weights:
    """The policy's parameters in ``dtype``, as one buffer."""
    buffer = flat_weights(policy, dtype=dtype, read=whole)
    return Weights(buffer=buffer, policy_version=policy_version, digest=digest(buffer, policy_version, threads=threads))


def import_weights(policy: nn.Module, weights: Weights, *, threads: int = 1) -> None:
    """Copy a buffer into the policy; AssertionError when its bytes or its version are not those that were sent."""
    assert digest(weights.buffer, weights.policy_version, threads=threads) == weights.digest, (
        f"policy version {weights.policy_version} arrived altered: its digest differs from the sender's"
    )
    load_flat_weights(policy, weights.buffer)
