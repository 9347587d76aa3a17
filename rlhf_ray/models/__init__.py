"""Model families; a new one is one file and one line in MODELS."""

from __future__ import annotations

from rlhf_ray.models.gpt2 import GPT2, PRESETS, GPT2Config, preset
from rlhf_ray.models.heads import SharedValueHead, ValueModel
from rlhf_ray.models.kv_cache import KVCache

MODELS = {"gpt2": GPT2}

__all__ = ["GPT2", "MODELS", "PRESETS", "GPT2Config", "KVCache", "SharedValueHead", "ValueModel", "preset"]
