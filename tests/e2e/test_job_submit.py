"""Two raylets in a real cluster, and a run that is submitted, stopped, submitted again and loses a machine."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from worlds import make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.config import PPOConfig
from rlhf_ray.run import read_metrics

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
STEPS = 20
TOKEN = "0123456789abcdef" * 2
PORTS = range(20_000, 32_000)
"""Below those that the system hands out to whoever asks for any, another cluster that starts meanwhile among them."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, 1000):
        with socket.socket() as one, suppress(OSError):
            one.bind(("", port))
            found.append(port)
        if len(found) == count:
            break
    assert len(found) == count
    return found


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come in {seconds:g} s"
        time.sleep(0.2)


class Cluster:
    """A head and a second machine, both this one, as `ray start` makes them."""

    def __init__(self, folder: Path) -> None:
        self._ports = free_ports(5)
        self.url = f"http://127.0.0.1:{self._ports[1]}"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }
        self.machines: list[subprocess.Popen[bytes]] = []
        self.log = folder / "ray.log"
        self._log = self.log.open("wb")
        # A socket's path may have 107 characters, which pytest's own folders would use up.
        self._temporary = Path(tempfile.mkdtemp(prefix="ray_", dir="/tmp"))

    def start(self) -> None:
        """Start both, and wait for them."""
        gcs, dashboard, client, first, second = self._ports
        head = ["--head", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        self._start(*head, agent=first)
        self._start(f"--address={ray.util.get_node_ip_address()}:{gcs}", agent=second)
        wait_until(self._takes_jobs, "whoever takes jobs")

    def _takes_jobs(self) -> bool:
        with suppress(OSError, RuntimeError):
            self.jobs().list_jobs()
            return True
        return False

    def _start(self, *options: str, agent: int) -> None:
        temporary = f"--temp-dir={self._temporary / str(len(self.machines))}"
        common = [
            "--num-cpus=2",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--dashboard-agent-listen-port={agent}",
        ]
        line = [*RAY, "start", "--block", temporary, *common, *options]
        machine = subprocess.Popen(line, env=self.env, stdout=self._log, stderr=self._log, start_new_session=True)
        self.machines.append(machine)
        wait_until(lambda: self._started() == len(self.machines), "a machine")

    def _started(self) -> int:
        assert all(machine.poll() is None for machine in self.machines), self.log.read_text(errors="replace")
        return self.log.read_bytes().count(b"Ray runtime started")

    def jobs(self, token: str = TOKEN) -> JobSubmissionClient:
        """Who takes jobs, asked by its HTTP."""
        return JobSubmissionClient(self.url, headers={"Authorization": f"Bearer {token}"})

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Ray's against the cluster."""
        env = {**self.env, "RAY_API_SERVER_ADDRESS": self.url}
        return subprocess.run(
            [*RAY, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )

    def lose(self, machine: subprocess.Popen[bytes]) -> None:
        """Kill a machine with everything that runs on it."""
        os.killpg(machine.pid, signal.SIGKILL)
        machine.wait()

    def stop(self) -> None:
        """End what is left, and nobody else's."""
        for machine in reversed(self.machines):
            if machine.poll() is None:
                machine.terminate()
                machine.wait(timeout=300)
        self._log.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def measured(config: PPOConfig) -> list[dict[str, Any]]:
    """A run's metrics without what the clock says."""
    rows = read_metrics(app.run_folder(config))
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def test_a_submitted_run_is_stopped_goes_on_loses_a_machine_and_equals_one_on_one_box(
    repository: Path, tmp_path: Path, cluster: Cluster
) -> None:
    make_world(tmp_path)
    alone, job = (ppo_config(tmp_path, run=name, total_steps=STEPS, save_every=5) for name in ("alone", "job"))
    settings = job.resolved() | {"num_rollout_workers": 2, "placement": "spread"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    runtime = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    entry = ["python", "launch/ppo.py", "--config", str(tmp_path / "job.yaml")]

    def submit(name: str, *options: str, flags: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        to = ["--submission-id", name, "--runtime-env-json", runtime, "--working-dir", str(repository)]
        return cluster.ray("job", "submit", *to, *options, "--", *entry, *flags)

    def ended(name: str) -> str:
        """How a job has ended, when it has."""
        status = lambda: jobs.get_job_status(name)  # noqa: E731
        wait_until(lambda: status().is_terminal(), f"the end of {name}")
        return str(status().value)

    with pytest.raises(AuthenticationError, match="Authentication failed"):
        cluster.jobs(token="f" * 32).list_jobs()
    jobs = cluster.jobs()

    refused = submit("refused", flags=["--checkpoints", "checkpoints"])
    assert refused.returncode == 1
    assert re.search(r"error: checkpoints = \S+: a submitted job runs in a copy of the working", refused.stdout)

    submit("stopped", "--no-wait")
    wait_until(lambda: len(measured(job)) >= 2, "step 2")
    jobs.stop_job("stopped")
    assert ended("stopped") == JobStatus.STOPPED
    done = len(measured(job))
    assert (app.run_folder(job) / "latest").read_text().strip() == f"step_{done:06d}" and done < STEPS
    assert f"stopped after step {done}; the same command goes on" in jobs.get_job_logs("stopped")

    submit("again", "--no-wait")
    wait_until(lambda: len(measured(job)) >= done + 2, "two more steps")
    cluster.lose(cluster.machines[1])
    said = cluster.ray("job", "logs", "--follow", "again").stdout
    assert ended("again") == JobStatus.SUCCEEDED
    assert "going on from" in said and f"ppo {STEPS}/{STEPS}" in said
    assert re.search(r"workers: learner 1 on \S+ \w+; rollout 1 on .*, 1 on ", said), said

    app.train_ppo(alone)
    assert measured(job) == measured(alone)
    names = [file.name for file in sorted((app.run_folder(alone) / f"step_{STEPS:06d}").glob("*.safetensors"))]
    for name in names:
        first, second = (app.run_folder(config) / f"step_{STEPS:06d}" / name for config in (alone, job))
        assert first.read_bytes() == second.read_bytes(), name
