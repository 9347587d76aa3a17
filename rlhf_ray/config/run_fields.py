"""The fields that every run has, whatever it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from rlhf_ray.config.loader import Config

HOW_TO_RUN = frozenset(
    {
        *("resume", "allow_config_change", "overwrite", "keep", "keep_every", "mirror", "show", "report"),
        *("auto_micro_batch", "profile_step"),
        *("memory.activation_checkpointing", "memory.offload_optimizer", "memory.sleep", "memory.share_base"),
    }
)
"""Fields that say how to start and compute and where to keep; a resumed run may differ in them."""


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
    """Delete the run's folder first, and its mirror."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints to keep, beside the best where checkpoints have a score."""
    keep_every: int = Field(0, ge=0)
    """Keep the checkpoint of every step that is a multiple of this for ever; 0 keeps none."""
    mirror: str | None = None
    """Where copies of the checkpoints go, and are taken from when the local folder lacks them: s3://bucket/path,
    gs://bucket/path or a mounted folder; <stage>/<run>/ below it. Credentials are the environment's."""
    show: Literal["live", "lines", "json"] = "live"
    """live: a view on a terminal, lines elsewhere; lines (or --quiet): lines everywhere; json (or --json): one object a
    step on standard output, everything else on standard error."""
    report: bool = True
    """Write report.html into the run's folder when it ends."""
    profile_step: int = Field(0, ge=0)
    """Step whose trace is written to trace/ in the run's folder, for Perfetto (docs/MONITORING.md); 0 is none."""
    auto_micro_batch: bool = False
    """Where a role's memory does not suffice, halve what goes through its model at once and do the same again, instead
    of ending with an error that says what to change."""
    max_bad_rows: int = Field(0, ge=0)
    """Malformed data rows to skip before the run stops."""
