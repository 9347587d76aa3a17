"""A PPO run killed in the middle of writing a checkpoint, and started again with the same command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worlds import make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.checkpoint import verify
from rlhf_ray.config import PPOConfig
from rlhf_ray.run import read_metrics

TRAIN = """
import sys
from pathlib import Path
from worlds import ppo_config
from rlhf_ray import app
app.train_ppo(ppo_config(Path(sys.argv[1]), run="killed", max_staleness=1, total_steps=8))
"""


def measured(config: PPOConfig) -> list[dict[str, Any]]:
    """A run's metrics without what the clock says."""
    rows = read_metrics(app.run_folder(config))
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def test_a_run_killed_while_it_saves_goes_on_as_if_nothing_had_happened(repository: Path, tmp_path: Path) -> None:
    make_world(tmp_path)
    changes: dict[str, Any] = {"max_staleness": 1, "total_steps": 8}
    whole, killed = (ppo_config(tmp_path, run=name, **changes) for name in ("whole", "killed"))
    app.train_ppo(whole)
    folder = app.run_folder(killed)
    paths = os.pathsep.join([str(repository), str(repository / "tests")])
    process = subprocess.Popen([sys.executable, "-c", TRAIN, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths})
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if list(folder.glob(".tmp-step_*")) and (folder / "step_000002").exists():
            process.kill()
        time.sleep(0.001)
    assert process.wait(timeout=100) == -signal.SIGKILL
    saved = sorted(folder.glob("step_*"))
    for checkpoint in saved:
        verify(checkpoint)
    left = len(read_metrics(folder))
    assert 2 <= len(saved) <= killed.keep + 1 and 2 <= left < 8
    app.train_ppo(killed)
    assert "going on from" in (folder / "log.txt").read_text(encoding="utf-8")
    assert measured(killed) == measured(whole)
    names = [file.name for file in sorted((app.run_folder(whole) / "step_000008").glob("*.safetensors"))]
    assert len(names) > 3
    for name in names:
        first, second = (app.run_folder(config) / "step_000008" / name for config in (whole, killed))
        assert first.read_bytes() == second.read_bytes(), name
