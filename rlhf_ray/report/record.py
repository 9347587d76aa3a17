"""What a run's folder holds, read for a report; whatever a run never wrote is empty or None.

Nothing here needs torch: a report of a run on another machine can be made anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet
import yaml

from rlhf_ray.rundir.files import read_json
from rlhf_ray.rundir.machine import MACHINE
from rlhf_ray.rundir.metrics import FILE_NAME, read_metrics

STAGES = {"ppo": "ppo", "normalise_samples": "reward_model", "completion_only": "sft", "tokenizer": "pretrain"}
"""A setting that only one stage has, and that stage."""

TITLES = {"ppo": "PPO", "sft": "Supervised fine-tuning", "reward_model": "Reward model", "pretrain": "Pre-training"}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run, as its folder tells it."""

    folder: Path
    stage: str
    """ppo, sft, reward_model or pretrain."""
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    log: list[tuple[datetime, str]]
    machine: dict[str, str]
    """Name -> value, of the machine that the run was last started on."""
    model: dict[str, Any]
    """The newest checkpoint's config.json."""
    probes: dict[int, list[dict[str, Any]]]
    """Step -> one row a prompt, of the first and the last round."""
    samples: list[dict[str, Any]]
    """Rows of the newest file of samples."""
    evaluation: dict[str, Any] | None
    """What launch/evaluate.py wrote."""
    closing: list[str]
    """What a stage said of its model when it was done."""
    memory: dict[str, Any] | None

    @property
    def name(self) -> str:
        """The folder's own name, which is the run's."""
        return self.folder.name

    @cached_property
    def steps(self) -> int:
        """The last step that was logged."""
        return max((row["step"] for row in self.metrics), default=0)

    @property
    def seconds(self) -> float:
        """Seconds of all steps; a stage logs the mean of the steps since its last line."""
        total, before = 0.0, 0
        for row in self.metrics:
            if "time/step" in row:
                total += row["time/step"] * (1 if self.stage == "ppo" else row["step"] - before)
                before = row["step"]
        return total


def read_record(folder: Path) -> RunRecord:
    """Read a run's folder; ValueError when it holds no run, or one that has not logged a step."""
    config_file = folder / "config.yaml"
    if not config_file.is_file() or not (folder / FILE_NAME).is_file():
        raise ValueError(
            f"{folder} holds no run: it has no config.yaml or no {FILE_NAME}; give checkpoints/<stage>/<run>"
        )
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    metrics = read_metrics(folder)
    if not metrics:
        raise ValueError(f"{folder}: the run has not logged a step yet")
    stages = [stage for setting, stage in STAGES.items() if setting in config]
    if not stages:
        raise ValueError(f"{config_file} is of no stage that a report is made of")
    return RunRecord(
        folder=folder,
        stage=stages[0],
        config=config,
        metrics=metrics,
        log=_log(folder / "log.txt"),
        machine=_json(folder / MACHINE) or {},
        model=_json(_newest(folder) / "config.json") or {},
        probes=_probes(folder / "probes"),
        samples=_newest_samples(folder / "samples"),
        evaluation=_json(folder / "evaluation.json"),
        closing=(_json(folder / "report.json") or {}).get("lines", []),
        memory=_json(folder / "memory.json"),
    )


def _json(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _newest(folder: Path) -> Path:
    latest = folder / "latest"
    return folder / latest.read_text(encoding="utf-8").strip() if latest.is_file() else folder


def _log(path: Path) -> list[tuple[datetime, str]]:
    """Lines with their times; one without a time goes on the line before it."""
    lines: list[tuple[datetime, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        stamp, _, text = line.partition(" ")
        try:
            lines.append((datetime.fromisoformat(stamp), text))
        except ValueError:
            lines[-1:] = [(when, f"{said} {line}") for when, said in lines[-1:]]
    return lines


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def _files(folder: Path) -> dict[int, Path]:
    """Step -> file of samples, in order; files that are still being written are left out."""
    return {int(path.stem.removeprefix("step_")): path for path in sorted(folder.glob("step_*.parquet"))}


def _probes(folder: Path) -> dict[int, list[dict[str, Any]]]:
    files = list(_files(folder).items())
    return {step: _rows(path) for step, path in (files[:1] + files[-1:])}


def _newest_samples(folder: Path) -> list[dict[str, Any]]:
    files = list(_files(folder).values())
    return _rows(files[-1]) if files else []
