"""Environment variables that Ray reads while it is imported.

They are set when ``rlhf_ray.runtime`` is imported, before any of its modules imports Ray; what the user has set stays.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rlhf_ray.config.loader import REPOSITORY

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_DEDUP_LOGS": "0",
    # Live pages show what was true two seconds ago, not ten.
    "RAY_metrics_report_interval_ms": "2000",
    # The first error is raised; its echoes in calls that depend on it say nothing new.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Idle OpenMP threads of one worker must soon leave the cores to another one; see cli.py.
    "GOMP_SPINCOUNT": "10000",
}
# One box needs no open ports: everything then listens on the loopback interface.
ONE_BOX = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def joins_a_cluster() -> bool:
    """Whether RAY_ADDRESS names a cluster to join, as it does inside a submitted job."""
    return bool(os.environ.get("RAY_ADDRESS"))


def in_a_job() -> bool:
    """Whether ``ray job submit`` started this process."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_lasting(folder: Path) -> None:
    """Raise ValueError when a folder for results is in a job's copy of the code, which Ray deletes with the job."""
    if in_a_job() and "runtime_resources" in REPOSITORY.parts and folder.is_relative_to(REPOSITORY):
        raise ValueError(
            f"checkpoints = {folder}: a submitted job runs in a copy of the working directory that is deleted when it "
            "ends; name a folder that every machine sees, such as --checkpoints /shared/checkpoints, or a --mirror"
        )


def stop_seconds() -> float:
    """How long ``ray job stop`` lets a job finish its step and save before it kills it."""
    return float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3"))


def prepare_environment() -> None:
    """Set the variables, and let workers find this package from whatever folder the driver was started in.

    Where Ray is imported already the variables are left alone: the processes that it starts would go by them and
    the driver would not, and refuse each other's tokens.
    """
    if "ray" not in sys.modules:
        for name, value in {**ENVIRONMENT, **({} if joins_a_cluster() else ONE_BOX)}.items():
            os.environ.setdefault(name, value)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(REPOSITORY) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, paths)])
