"""A training job: what every process of it needs to know, and one rank's whole part in it.

Left out on purpose: starting processes, which is ``train.py``'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.config import TrainConfig, repository_path
from rlhf_ray.config.run_fields import HOW_TO_RUN
from rlhf_ray.generation.load import find_device
from rlhf_ray.objectives import OBJECTIVES
from rlhf_ray.run import Run
from rlhf_ray.runtime.train_loop import TrainLoop
from rlhf_ray.runtime.train_run import run_loop
from rlhf_ray.runtime.train_state import digest
from rlhf_ray.runtime.train_step import World

RUNTIME_FIELDS = HOW_TO_RUN | {"cache"}
"""Fields that say how to start, not what to do; they are no part of a run's configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker needs to know; sent to it as it is."""

    objective: str
    config: TrainConfig
    saved_config: dict[str, Any]
    """What the run's config.yaml holds."""
    folder: Path
    inputs: str
    device: str
    threads: int


def make_job(objective_name: str, config: TrainConfig) -> Job:
    """Look at everything that can be wrong before training; ValueError naming what is."""
    saved = config.resolved(without=RUNTIME_FIELDS)
    config = _absolute(config)
    objective = OBJECTIVES[objective_name](config)
    cores = len(os.sched_getaffinity(0))
    return Job(
        objective=objective_name,
        config=config,
        saved_config=saved,
        folder=config.checkpoints / objective.stage / config.run,
        inputs=digest(objective.inputs()),
        device=str(find_device(config.device)),
        threads=config.threads or max(1, cores // max(1, config.num_workers)),
    )


def _absolute(config: TrainConfig) -> TrainConfig:
    """The configuration with every path absolute, for processes that run in other folders."""
    paths: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Path):
            paths[name] = repository_path(value)
        elif isinstance(value, list) and value and isinstance(value[0], Path):
            paths[name] = [repository_path(path) for path in value]
    return config.model_copy(update=paths)


def work(job: Job, world: World, should_stop: Callable[[], bool] | None) -> dict[str, Any]:
    """One rank's whole part; ``complete`` says whether the last step was reached, ``error`` what the user
    must mend.

    Without ``should_stop`` this is the main thread of the program, and signals are caught here.
    """
    torch.set_num_threads(job.threads)
    try:
        loop = TrainLoop(OBJECTIVES[job.objective](job.config), job.config, world)
    except ValueError as error:
        # The same on every rank, and for ever: to raise it would make Ray Train try again.
        return {"complete": False, "error": str(error)}
    if world.rank > 0:
        assert should_stop is not None, "a program of its own has one rank"
        return {"complete": run_loop(loop, None, job.folder, inputs=job.inputs, should_stop=should_stop)}
    with Run.open(job.folder, job.saved_config, resume=True) as run:
        if should_stop is None:
            run.install_signal_handlers()
        asked = should_stop or (lambda: run.should_stop)
        complete = run_loop(loop, run, job.folder, inputs=job.inputs, should_stop=asked)
    return {"complete": complete}
