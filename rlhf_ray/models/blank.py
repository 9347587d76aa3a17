"""Models whose parameters are shapes alone, to be given their values.

Left out on purpose: the values, which a file or a file's form in memory has (``hf_weights.py``, ``shared_base.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rlhf_ray.models.gpt2 import GPT2, GPT2Config


def blank(config: GPT2Config, dtype: torch.dtype) -> GPT2:
    """A model on torch's meta device."""
    with torch.device("meta"), _WithoutInitialisation():
        return GPT2(config, device="meta", dtype=dtype)


class _WithoutInitialisation(TorchFunctionMode):
    """Skips random initialisation, which on tensors without values imports torch.compile's machinery, for seconds."""

    skipped = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.skipped:
            return None
        return func(*args, **(kwargs or {}))
