"""Low-rank adapters, as any stage that fine-tunes may train them instead of the weights (``models/lora.py``)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rlhf_ray.config.loader import Section

Target = Literal["attention_in", "attention_out", "mlp_in", "mlp_out"]
"""The four linear layers of a block: into queries, keys and values; out of attention; into the MLP; out of it."""


class LoRA(Section):
    """Train a product of two narrow matrices beside each target, the weights themselves frozen (Hu et al. 2021)."""

    rank: int = Field(0, ge=0)
    """Rank of the adapters; 0 trains every weight."""
    alpha: float = Field(32.0, gt=0)
    """An adapter's product is multiplied by alpha / rank."""
    targets: list[Target] = ["attention_in", "attention_out", "mlp_in", "mlp_out"]
    """Layers of every block that get an adapter."""

    @field_validator("targets")
    @classmethod
    def _each_once(cls, targets: list[Target]) -> list[Target]:
        if not targets or len(set(targets)) < len(targets):
            raise ValueError("name at least one layer, and each once")
        return targets
