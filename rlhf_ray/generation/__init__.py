"""Generation engines; a new one is one file and one line in ENGINES."""

from __future__ import annotations

from rlhf_ray.generation.engine import Completion, Engine
from rlhf_ray.generation.sampling import Sampling, row_uniforms, sample

ENGINES = {"torch": Engine}

__all__ = ["ENGINES", "Completion", "Engine", "Sampling", "row_uniforms", "sample"]
