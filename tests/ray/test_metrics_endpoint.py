"""A run's metrics as Prometheus gets them: read from Ray's endpoint while the run goes on."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from threading import Thread

import pytest
import ray
from worlds import make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.monitoring.grafana import FILE_NAME, dashboard
from rlhf_ray.monitoring.metrics import QUEUE, STEP, WORKER
from rlhf_ray.run import read_metrics

SAMPLE = re.compile(r'^(ray_rlhf_\w+)\{.*?role="(\w*)",run="([\w-]*)",worker="([\w ]*)"\} (\S+)$', flags=re.MULTILINE)
Seen = dict[tuple[str, str, str], float]
WORKERS = [("rollout", f"rollout worker {rank}") for rank in (0, 1)] + [
    (role, f"{role} worker 0") for role in ("reward", "reference", "learner")
]
EXPECTED = (
    {(metric.exported, metric.role, "") for metric in STEP}
    | {(metric.exported, role, "") for metric in QUEUE for role, _ in WORKERS}
    | {(metric.exported, role, worker) for metric in WORKER for role, worker in WORKERS}
)


def session() -> Path:
    return Path(ray._private.worker._global_node.get_session_dir_path())


def scrape(run: str) -> Seen:
    """(name, role, worker): value, of everything that the session's endpoints say about a run."""
    (group,) = json.loads((session() / "prom_metrics_service_discovery.json").read_text())
    seen: Seen = {}
    for target in group["targets"]:
        try:
            text = urllib.request.urlopen(f"http://{target}/metrics", timeout=10).read().decode()
        except (OSError, HTTPException):  # Ray lists its own before they listen, and breaks off while it starts
            continue
        seen |= {(n, role, worker): float(v) for n, role, of, worker, v in SAMPLE.findall(text) if of == run}
    return seen


def watch(run: str, found: Seen) -> None:
    """Look until everything is there, then ask the run to stop."""
    deadline = time.monotonic() + 300
    try:
        while not found.keys() >= EXPECTED and time.monotonic() < deadline:
            time.sleep(1)
            if ray.is_initialized() and (session() / "prom_metrics_service_discovery.json").exists():
                found |= scrape(run)
    finally:  # or it would go on for ever
        os.kill(os.getpid(), signal.SIGINT)


def check_trace(path: Path) -> None:
    """Every process has its lane, the driver's phases hold what the workers do in them, and Ray's notes are there."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        trace = json.load(file)
    lanes = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    spans: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            times = (event["ts"], event["ts"] + event["dur"])
            spans.setdefault((lanes[event["pid"]], event["name"]), []).append(times)
    assert set(lanes.values()) == {"driver", "waiting for a worker", *(worker for _, worker in WORKERS)}
    assert trace["otherData"] == {"run": "watched", "step": 2, "missing": []}
    (step,), (learn,), (update,) = (
        spans[name] for name in (("driver", "step 2"), ("driver", "learn"), ("learner worker 0", "learner.update"))
    )
    assert step[0] <= learn[0] <= update[0] <= update[1] <= learn[1] <= step[1]
    asked, *_, had = spans["driver", "generate"]
    rows = [time for rank in (0, 1) for time in spans.get((f"rollout worker {rank}", "rollout.generate"), [])]
    assert len(rows) == 3 and all(asked[0] <= begun <= ended <= had[1] for begun, ended in rows)
    assert len(spans["waiting for a worker", "generate"]) == 3
    for role, worker in WORKERS:
        assert any(name.startswith(f"task::{role}.") for lane, name in spans if lane == worker), worker


def test_every_documented_metric_is_there_with_the_value_of_the_run(tmp_path: Path) -> None:
    make_world(tmp_path)
    endless = {"total_steps": 5000, "save_every": 5000}
    config = ppo_config(tmp_path, run="watched", num_rollout_workers=2, profile_step=2, **endless)
    found: Seen = {}
    thread = Thread(target=watch, args=("watched", found))
    thread.start()
    folder = app.train_ppo(config)
    thread.join()
    assert found.keys() == EXPECTED
    of_run = {(name, role): value for (name, role, worker), value in found.items() if not worker}
    rows = {row["step"]: row for row in read_metrics(folder)}
    step = int(of_run["ray_rlhf_step", ""])
    near = [rows[number] for number in range(step - 2, step + 3) if number in rows]  # a scrape may fall between some
    for metric in STEP:
        if metric.key != "step":
            value = of_run[metric.exported, metric.role]
            assert any(value == pytest.approx(row[metric.key], rel=0.05) for row in near), metric.key
    for role, worker in WORKERS:
        assert found["ray_rlhf_waiting_jobs", role, ""] in range(9)
        assert found["ray_rlhf_running_jobs", role, ""] in range(9)
        assert 0 < found["ray_rlhf_worker_busy_seconds_total", role, worker] < 120
        assert 50e6 < found["ray_rlhf_worker_memory_bytes", role, worker] < 5e9
    placed = session() / "metrics" / "grafana" / "dashboards" / FILE_NAME
    assert json.loads(placed.read_text(encoding="utf-8")) == dashboard()
    check_trace(folder / "trace" / "step_000002.json.gz")
