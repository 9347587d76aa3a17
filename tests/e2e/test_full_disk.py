"""A disk that is full: the command says so in one line, what was saved is intact, and the same command goes on."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import exit_code
from worlds import make_world, ppo_config

from rlhf_ray import app, cli
from rlhf_ray.checkpoint import verify
from rlhf_ray.config import PPOConfig
from rlhf_ray.run import read_metrics


def command(arguments: list[str], limit: int, errors: Path) -> None:
    """A process of its own: the command, where no file may grow beyond ``limit`` bytes."""
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with errors.open("w") as file, contextlib.redirect_stderr(file):
        code = cli.main(PPOConfig, "", None, app.train_ppo, arguments)
    sys.exit(code)


def run(config: PPOConfig, folder: Path, limit: int = 0) -> tuple[int | None, list[str]]:
    """Exit code and what was said of errors."""
    file, errors = folder / "config.yaml", folder / "errors.txt"
    file.write_text(yaml.safe_dump(config.resolved()), encoding="utf-8")
    return exit_code(command, ["--config", str(file)], limit, errors), errors.read_text().splitlines()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    make_world(folder)
    return folder


@pytest.mark.parametrize(
    ("limit", "changes", "message"),
    [
        (30_000, {}, r"step_000001: could not be written: .*; the checkpoints before it are intact"),
        (
            3_000,
            {"save_every": 9, "sample_rows": 0},
            r"the metrics of step \d could not be written: File too large; the",
        ),
        (
            4_000,
            {"save_every": 9, "batch_size": 96, "sample_rows": 96},
            r"the samples of step 1 could not be written: .*File too large",
        ),
    ],
)
def test_a_full_disk_ends_the_run_with_one_line(
    world: Path, tmp_path: Path, limit: int, changes: dict[str, Any], message: str
) -> None:
    config = ppo_config(world, checkpoints=tmp_path / "checkpoints", total_steps=4, **changes)
    code, errors = run(config, tmp_path, limit)
    assert code == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(errors[-1])
    assert errors[-1].startswith("error: ") and "Traceback" not in " ".join(errors)
    folder = app.run_folder(config)
    assert not list(folder.glob(".tmp-*")) and not list(folder.glob("samples/*.tmp"))
    code, errors = run(config, tmp_path)  # there is room again
    assert code == 0
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4]
    assert verify(folder / "step_000004").step == 4
