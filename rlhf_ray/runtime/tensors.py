"""Tensors on their way between Ray's processes travel as numpy arrays, whose bytes Ray hands over as they are.

Torch's own pickling costs a shard's rollout three times as much, whatever its size, and a whole batch four times.

Left out on purpose: tensors of a GPU, with gradients or of bfloat16, which numpy has no arrays for; nobody sends any,
and whoever does gets torch's error.
"""

from __future__ import annotations

import numpy as np
import torch
from ray.util import register_serializer
from torch import Tensor


def send_as_arrays() -> None:
    """Have this process send its tensors so; in a process that has joined a cluster."""
    register_serializer(torch.Tensor, serializer=Tensor.numpy, deserializer=_from_array)


def _from_array(array: np.ndarray) -> Tensor:
    """A copy: what arrives is the store's own memory, which nobody may write to."""
    return torch.from_numpy(array.copy())
