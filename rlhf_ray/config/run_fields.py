"""The fields that every run has, whatever it trains."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rlhf_ray.config.loader import Config


class RunFields(Config):
    """What every stage's run has."""

    run: str = Field("default", min_length=1, pattern=r"^[\w.-]+$")
    """Name of the run: the folder below the stage's checkpoints."""
    checkpoints: Path = Path("checkpoints")
    """Folder that holds every stage's runs."""
    seed: int = Field(0, ge=0)
    resume: bool = True
    """Go on from the newest complete checkpoint of the run, if there is one."""
    allow_config_change: bool = False
    """Resume although the saved configuration differs."""
    overwrite: bool = False
    """Delete the run's folder first."""
    max_bad_rows: int = Field(0, ge=0)
    """Malformed data rows to skip before the run stops."""
