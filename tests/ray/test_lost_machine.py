"""A machine that is gone takes its workers and the values in its object store along; both are made again.

The head takes the run along, which goes on by the same command.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import yaml
from ray.cluster_utils import Cluster
from run_ends import end_of
from worlds import make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.config.loader import REPOSITORY
from rlhf_ray.failures import Deaths
from rlhf_ray.run import read_metrics
from rlhf_ray.runtime.all_crews import stop, wait_until_built
from rlhf_ray.runtime.cluster import connect, ray
from rlhf_ray.runtime.crew import RayCrew
from rlhf_ray.runtime.placement import Request
from rlhf_ray.types import Usage

NOTICED_SOON = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
}
IN_STORES = {"max_direct_call_object_size": 1000}
"""Bytes; larger values stay where they were made, as those of real models do."""


class Patient(Cluster):
    """Gives a machine that is busy with other things the time to start one more."""

    def _wait_for_node(self, node: Any, timeout: float = 300.0) -> None:
        super()._wait_for_node(node, timeout)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two raylets, of which this process is on the first."""
    ray.shutdown()
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": {**NOTICED_SOON, **IN_STORES}}
    cluster = Patient(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def lose_second(cluster: Cluster) -> None:
    """Kill the second raylet, and its workers with it."""
    (second,) = cluster.worker_nodes
    cluster.remove_node(second, allow_graceful=False)


class Maker:
    """Makes values that are too large to travel with an answer."""

    def make(self, number: int) -> np.ndarray:
        """1000 of the number, after a while."""
        time.sleep(0.3)
        return np.full(1000, number)

    def where(self) -> str:
        """The machine that it is on, after a while."""
        time.sleep(0.3)
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def double(self, value: np.ndarray) -> np.ndarray:
        """Twice the value."""
        return 2 * value

    def usage(self) -> Usage:
        """Nothing."""
        return Usage()


def test_values_lost_with_their_machine_are_made_again_and_its_worker_when_there_is_room(cluster: Cluster) -> None:
    """The first machine has no room for a second worker."""
    seats = connect(need=[Request(role="maker", count=2, cpus=1.5, spread=True)])["maker"]
    assert len({seat.node.id for seat in seats}) == 2
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    said: list[str] = []
    crew = RayCrew(Maker, {}, role="maker", seats=seats, deaths=Deaths(2, 600.0, said.append), timeout=120.0)
    try:
        wait_until_built([crew])
        crew.timeout = 5.0
        made = [crew.call("make", number) for number in range(6)]
        for handle in made:
            handle.job.ended.result()  # it is there, but not here
        lose_second(cluster)
        doubled = [crew.call("double", handle) for handle in made]
        for number, (handle, twice) in enumerate(zip(made, doubled, strict=True)):
            assert twice.result().tolist() == [2 * number] * 1000
            assert handle.result().tolist() == [number] * 1000
        lost = [
            line for line in said if line.endswith("make: its value was lost with its machine; it is computed again")
        ]
        assert 1 <= len(lost) <= 5
        (died,) = [line for line in said if " died " in line]
        assert died.startswith("maker worker 1 died (its ") and died.endswith("; replaced, 1 job handed out again")
        while "maker worker 1 has not started within 5 s; the others go on without it" not in said:
            assert crew.call("where").result() == seats[0].node.id
        third = cluster.add_node(num_cpus=2)
        while crew.call("where").result() != third.node_id:
            pass
    finally:
        stop([crew])


def test_a_run_that_loses_a_machine_ends_as_if_nothing_had_happened(cluster: Cluster, tmp_path: Path) -> None:
    make_world(tmp_path)
    changes: dict[str, Any] = {"total_steps": 12, "save_every": 4, "max_staleness": 1, "generation": {"shard_size": 2}}
    alone, spread = (ppo_config(tmp_path, run=name, **changes) for name in ("alone", "spread"))
    app.train_ppo(alone)

    def lose_it_in_mid_run() -> None:
        while len(read_metrics(app.run_folder(spread))) < 2:
            time.sleep(0.01)
        lose_second(cluster)

    thread = Thread(target=lose_it_in_mid_run, daemon=True)
    thread.start()
    app.train_ppo(spread.model_copy(update={"num_rollout_workers": 2, "placement": "spread"}))
    thread.join(60)
    assert not thread.is_alive()
    numbers = [
        [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in read_metrics(folder)]
        for folder in (app.run_folder(alone), app.run_folder(spread))
    ]
    assert numbers[0] == numbers[1]
    log = (app.run_folder(spread) / "log.txt").read_text()
    (died,) = [line for line in log.splitlines() if " died " in line]
    assert "rollout worker" in died and "; replaced" in died


def test_a_run_whose_head_is_gone_ends_and_the_same_command_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    make_world(tmp_path)
    whole, config = (ppo_config(tmp_path, run=name, total_steps=30, save_every=2) for name in ("whole", "headless"))
    file = tmp_path / "headless.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    line = [sys.executable, "launch/ppo.py", "--config", str(file)]
    soon = {"RAY_AUTH_MODE": "disabled", **os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "3"}
    run = subprocess.Popen([*line, "--num-rollout-workers", "1"], cwd=REPOSITORY, env=soon)
    while len(read_metrics(app.run_folder(config))) < 3:
        assert run.poll() is None
        time.sleep(0.01)
    cluster.remove_node(cluster.head_node, allow_graceful=False)
    app.train_ppo(whole)  # meanwhile
    assert run.wait(300) not in (0, 3)
    app.train_ppo(config)
    assert "going on from" in (app.run_folder(config) / "log.txt").read_text(encoding="utf-8")
    assert end_of(app.run_folder(config), 30) == end_of(app.run_folder(whole), 30)
