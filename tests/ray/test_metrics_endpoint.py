"""A run's metrics as Prometheus gets them: read from Ray's endpoint while the run goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from threading import Thread

import pytest
import ray
from worlds import make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.monitoring.grafana import FILE_NAME, dashboard
from rlhf_ray.monitoring.metrics import STEP, WORKER
from rlhf_ray.run import read_metrics

SAMPLE = re.compile(r'^(ray_rlhf_\w+)\{.*?role="(\w*)",run="([\w-]*)",worker="([\w ]*)"\} (\S+)$', flags=re.MULTILINE)
Seen = dict[tuple[str, str, str], float]
WORKERS = [("rollout", f"rollout worker {rank}") for rank in (0, 1)] + [
    (role, f"{role} worker 0") for role in ("reward", "reference", "learner")
]
EXPECTED = {(metric.exported, metric.role, "") for metric in STEP} | {
    (metric.exported, role, worker) for metric in WORKER for role, worker in WORKERS
}


def session() -> Path:
    return Path(ray._private.worker._global_node.get_session_dir_path())


def scrape(run: str) -> Seen:
    """(name, role, worker): value, of everything that the session's endpoints say about a run."""
    (group,) = json.loads((session() / "prom_metrics_service_discovery.json").read_text())
    seen: Seen = {}
    for target in group["targets"]:
        try:
            text = urllib.request.urlopen(f"http://{target}/metrics", timeout=10).read().decode()
        except urllib.error.URLError:  # Ray lists its own ones before they listen
            continue
        seen |= {(n, role, worker): float(v) for n, role, of, worker, v in SAMPLE.findall(text) if of == run}
    return seen


def watch(run: str, found: Seen) -> None:
    """Look until everything is there, then ask the run to stop."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if ray.is_initialized() and (session() / "prom_metrics_service_discovery.json").exists():
            found |= scrape(run)
            if found.keys() >= EXPECTED:
                break
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGINT)


def test_every_documented_metric_is_there_with_the_value_of_the_run(tmp_path: Path) -> None:
    make_world(tmp_path)
    config = ppo_config(tmp_path, run="watched", num_rollout_workers=2, total_steps=5000, save_every=5000)
    found: Seen = {}
    thread = Thread(target=watch, args=("watched", found))
    thread.start()
    folder = app.train_ppo(config)
    thread.join()
    assert found.keys() == EXPECTED
    of_run = {(name, role): value for (name, role, worker), value in found.items() if not worker}
    rows = {row["step"]: row for row in read_metrics(folder)}
    step = int(of_run["ray_rlhf_step", ""])
    near = [rows[number] for number in (step - 1, step, step + 1) if number in rows]  # a scrape may fall between two
    for metric in STEP:
        if metric.key != "step":
            value = of_run[metric.exported, metric.role]
            assert any(value == pytest.approx(row[metric.key], rel=0.05) for row in near), metric.key
    for role, worker in WORKERS:
        assert 0 < found["ray_rlhf_worker_busy_seconds_total", role, worker] < 120
        assert 50e6 < found["ray_rlhf_worker_memory_bytes", role, worker] < 5e9
    placed = session() / "metrics" / "grafana" / "dashboards" / FILE_NAME
    assert json.loads(placed.read_text(encoding="utf-8")) == dashboard()
