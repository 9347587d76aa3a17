"""Running a training stage through Ray Train: in this process, or on any number of workers.

With ``num_workers`` 0 TorchTrainer runs the loop here, at once and without a cluster (its local mode).
Otherwise each worker is a process with gloo or NCCL between them; when one dies, Ray Train starts them
anew and they go on from the newest complete checkpoint.

Left out on purpose: ``ray.train.report``; metrics and checkpoints are in the run's own folder, where they
also are without Ray.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
import yaml

from rlhf_ray import console
from rlhf_ray.checkpoint import CheckpointStore
from rlhf_ray.config import TrainConfig
from rlhf_ray.models.folders import model_folder
from rlhf_ray.models.scoring import compute_type
from rlhf_ray.run import Run, prepare_folder
from rlhf_ray.rundir.config_diff import config_difference
from rlhf_ray.rundir.lock import RunLock
from rlhf_ray.rundir.metrics import read_metrics
from rlhf_ray.rundir.signals import StopSignals
from rlhf_ray.runtime.cluster import connect
from rlhf_ray.runtime.placement import Request
from rlhf_ray.runtime.train_job import Job, make_job, work
from rlhf_ray.runtime.train_state import ClosingReport, TrainState
from rlhf_ray.runtime.train_step import World
from rlhf_ray.storage import mirror_of

CPUS_PER_WORKER = 0.5
"""A booking, not a limit; whole cores would leave Ray none for anything else on a small machine."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STOP = ".stop"
"""File in the run's folder by which the driver asks the workers to save and stop."""
RAY_TRAIN = ".ray_train"
"""Folder in the run's folder that Ray Train keeps its own state in while it runs."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop; it has saved and can be resumed."""


def is_complete(job: Job) -> bool:
    """Whether the run's folder holds the finished result of this very configuration and these inputs."""
    report = ClosingReport.read(job.folder)
    config = job.folder / "config.yaml"
    if report is None or report.inputs != job.inputs or not config.is_file():
        return False
    saved = yaml.safe_load(config.read_text(encoding="utf-8"))
    wanted = yaml.safe_load(yaml.safe_dump(job.saved_config))
    return not config_difference(saved if isinstance(saved, dict) else {}, wanted)


def train(objective_name: str, config: TrainConfig) -> Path:
    """Train to the end, resuming what is there; returns the model's folder.

    Raises ValueError for what the user can mend, and Interrupted after Ctrl-C or SIGTERM, once all is saved.
    """
    job = make_job(objective_name, config)
    mirror = mirror_of(config, job.folder.parent.name)
    if config.overwrite:
        prepare_folder(job.folder, mirror, overwrite=True)
    if config.resume and is_complete(job):
        _say_complete(job)
        CheckpointStore(job.folder, keep=config.keep, keep_every=config.keep_every, mirror=mirror).close()
        return model_folder(job.folder)
    (job.folder / STOP).unlink(missing_ok=True)
    _clear_if_nothing_came_of_it(job.folder)
    prepare_folder(job.folder, mirror, overwrite=False)
    console.say(f"writing to {job.folder}")
    try:
        with Run.open(
            job.folder, job.saved_config, resume=config.resume, allow_config_change=config.allow_config_change
        ):  # by its own process again, which tells of refused checkpoints; this one settles what is wrong with it
            store = CheckpointStore(job.folder, keep=1, mirror=mirror, report=lambda refused: None)
            _check_inputs(job, store.newest_complete())
        complete = _here(job) if config.num_workers == 0 else _on_ray(job)
    finally:
        _clear_if_nothing_came_of_it(job.folder)
    if not complete:
        raise Interrupted(f"stopped and saved in {job.folder}; run the same command again to go on")
    return model_folder(job.folder)


def _clear_if_nothing_came_of_it(folder: Path) -> None:
    """Remove what a run that never began has left: its configuration must not bind the next one."""
    if not folder.is_dir():
        return
    try:
        lock = RunLock(folder)
    except ValueError:
        return  # another process is at work there
    with lock:
        if read_metrics(folder) or CheckpointStore(folder, keep=1).latest() is not None:
            return
        for name in ("config.yaml", "machine.json", "metrics.jsonl", "log.txt"):
            (folder / name).unlink(missing_ok=True)
        if [path.name for path in folder.iterdir()] == [".lock"]:
            shutil.rmtree(folder)


def _say_complete(job: Job) -> None:
    report = ClosingReport.read(job.folder)
    assert report is not None
    console.say(f"{job.folder} is complete already, {report.step} steps; pass --overwrite to begin anew")
    for line in report.lines:
        console.say(line)


def _check_inputs(job: Job, newest: Path | None) -> None:
    if newest is None or job.config.allow_config_change:
        return
    if TrainState.read(newest).inputs != job.inputs:
        raise ValueError(
            f"{job.folder}: the data or the model that this run began with has changed; pass --overwrite "
            "to begin anew, or --allow-config-change to go on with what is there now"
        )


def _trainer(loop: Callable[..., Any], job: Job) -> Any:
    """The TorchTrainer of a job."""
    import ray.train  # slow to import, and who only asks whether a run is complete does without
    from ray.train.torch import TorchConfig, TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    use_gpu = job.device.startswith("cuda")
    resources = {"CPU": CPUS_PER_WORKER, "GPU": 1.0} if use_gpu else {"CPU": CPUS_PER_WORKER}
    workers = job.config.num_workers
    return TorchTrainer(
        loop,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu and workers > 0,
            resources_per_worker=resources if workers else None,
        ),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=str(job.folder / RAY_TRAIN),
            failure_config=ray.train.FailureConfig(max_failures=job.config.max_restarts),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def _local_loop(config: dict[str, Any]) -> dict[str, Any]:
    job: Job = config["job"]
    in_main_thread = threading.current_thread() is threading.main_thread()
    world = World(device=torch.device(job.device), dtype=compute_type(DTYPES[job.config.dtype], job.device))
    return work(job, world, None if in_main_thread else lambda: False)


def _here(job: Job) -> bool:
    threads = torch.get_num_threads()
    try:
        return _settle(_trainer(_local_loop, job).fit().return_value)
    finally:
        torch.set_num_threads(threads)


def _settle(result: dict[str, Any]) -> bool:
    if "error" in result:
        raise ValueError(result["error"])
    return bool(result["complete"])


# --- on Ray workers


def _worker_loop(config: dict[str, Any]) -> dict[str, Any]:
    import ray.train
    from ray.train.torch import get_device

    job: Job = config["job"]
    context, device = ray.train.get_context(), get_device()
    world = World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=device,
        dtype=compute_type(DTYPES[job.config.dtype], device),
    )
    return work(job, world, (job.folder / STOP).exists)


def _on_ray(job: Job) -> bool:
    """Train on Ray workers; this process waits, and passes signals on to them."""
    from ray.train import TrainingFailedError

    gpus = 1.0 if job.device.startswith("cuda") else 0.0
    connect(need=[Request(role="training", count=job.config.num_workers, cpus=CPUS_PER_WORKER, gpus=gpus)])
    trainer = _trainer(_worker_loop, job)
    signals = StopSignals() if threading.current_thread() is threading.main_thread() else None
    result = _in_background(trainer.fit)
    try:
        while not result.done():
            wait([result], timeout=0.2)
            if signals is not None and signals.should_stop:
                (job.folder / STOP).touch()
        return _settle(result.result().return_value)
    except TrainingFailedError as error:
        raise _mendable(error) from error
    finally:
        if signals is not None:
            signals.restore()
        (job.folder / STOP).unlink(missing_ok=True)
        shutil.rmtree(job.folder / RAY_TRAIN, ignore_errors=True)


def _in_background(fit: Callable[[], Any]) -> Future[Any]:
    """Run ``fit`` in a thread: there Ray Train, which aborts at Ctrl-C, leaves the signals to us."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(fit())
        except BaseException as error:  # raised again where the result is asked for
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # a daemon: giving up must not wait for it
    return result


def _mendable(error: Exception) -> Exception:
    """The ValueError that a worker raised, if that is what made the run fail; else the failure itself."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, ValueError):
                return ValueError(str(getattr(cause, "cause", None) or cause))
            cause = getattr(cause, "cause", None) or cause.__cause__
    return error
