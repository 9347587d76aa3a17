"""Which preset a stage starts from: ``configs/<stage>/<preset>.yaml``, overrides only."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlhf_ray.config.loader import REPOSITORY

NVIDIA_CONTROL = Path("/dev/nvidiactl")


def hardware_preset() -> str:
    """The preset that fits this machine: mini_xl with a GPU, tiny without; found without importing torch."""
    has_gpu = NVIDIA_CONTROL.exists() or shutil.which("nvidia-smi") is not None
    return "mini_xl" if has_gpu else "tiny"


def preset_file(stage: str, preset: str) -> Path:
    """Where a stage's preset is; not every stage has one of every name."""
    return REPOSITORY / "configs" / stage / f"{preset}.yaml"
