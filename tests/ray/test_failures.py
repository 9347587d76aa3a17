"""PPO on Ray whose parts are killed or stopped in the middle of a call: it ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL, SIGSTOP
from typing import Any

import pytest
from hunting import Hunt
from run_ends import end_of
from worlds import make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.config import PPOConfig
from rlhf_ray.failures import GaveUp
from rlhf_ray.run import read_metrics

CHANGES: dict[str, Any] = {
    "total_steps": 8,
    "save_every": 2,
    "max_staleness": 1,
    "generation": {"shard_size": 2},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    make_world(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(world: Path) -> PPOConfig:
    """The run that the others must equal, all in one process."""
    config = ppo_config(world, run="undisturbed", **CHANGES)
    app.train_ppo(config)
    return config


def logged(config: PPOConfig, steps: int) -> Callable[[], bool]:
    """Whether a run has logged so many steps."""
    return lambda: len(read_metrics(app.run_folder(config))) >= steps


def assert_same(config: PPOConfig, undisturbed: PPOConfig) -> None:
    """All that both runs leave behind."""
    end, expected = (end_of(app.run_folder(one), one.total_steps) for one in (config, undisturbed))
    assert end == expected
    assert [row["step"] for row in end["metrics"]] == list(range(1, config.total_steps + 1))
    assert len([name for name in end["sha256"] if name.endswith(".safetensors")]) > 3


def test_the_dead_and_the_hung_are_replaced_in_mid_batch_and_nothing_shows(world: Path, undisturbed: PPOConfig) -> None:
    config = ppo_config(world, run="struck", num_rollout_workers=2, call_timeout=8.0, **CHANGES)
    hunt = Hunt(
        (logged(config, 1), "rollout.generate", SIGKILL),
        (logged(config, 2), "reward.score", SIGKILL),
        (logged(config, 3), "reference.logprobs", SIGKILL),
        (logged(config, 4), "rollout.generate", SIGSTOP),
    )
    app.train_ppo(config)
    assert hunt.left == []
    assert_same(config, undisturbed)
    rows = read_metrics(app.run_folder(config))
    assert rows[0]["perf/restarts"] == 0 and rows[-1]["perf/restarts"] == 4
    log = (app.run_folder(config) / "log.txt").read_text()
    assert log.count("replaced, ") == log.count(" handed out again") == 4
    assert log.count("reward worker 0 died (its process ended: killed, out of memory or crashed)") == 1
    assert log.count("died (no answer to generate for 8 s)") == 1


def test_the_learners_death_takes_the_run_back_to_its_last_checkpoint(world: Path, undisturbed: PPOConfig) -> None:
    """Once before there is any, and once after three steps, of which the third is done again; a rollout worker dies
    meanwhile in the middle of a broadcast of weights.
    """
    config = ppo_config(world, run="unlearned", num_rollout_workers=2, weight_sync="direct", **CHANGES)
    hunt = Hunt(
        (lambda: True, "learner.update", SIGKILL),
        (logged(config, 2), "rollout.receive", SIGKILL, "learner.weights"),
        (logged(config, 3), "learner.evaluate", SIGKILL),
    )
    app.train_ppo(config)
    assert hunt.left == []
    assert_same(config, undisturbed)
    assert read_metrics(app.run_folder(config))[-1]["perf/restarts"] == 3
    log = (app.run_folder(config) / "log.txt").read_text()
    assert " go through the store: their broadcast failed (" in log
    assert log.count("learner worker 0 died (its process ended: killed, out of memory or crashed)") == 2
    assert log.count("the run goes back to its last checkpoint") == 2 and log.count("going on from") == 1


def test_a_run_whose_workers_die_too_often_saves_and_stops_and_can_be_gone_on_with(world: Path) -> None:
    changes = {**CHANGES, "max_staleness": 0, "save_every": 100}
    whole, config = (ppo_config(world, run=name, **changes) for name in ("whole", "given-up"))
    app.train_ppo(whole)
    hunt = Hunt((logged(config, 3), "rollout.generate", SIGKILL))
    said = r"^workers died once within 600 s, and max_restarts is 0: rollout worker 0 once; at last rollout worker 0 \("
    with pytest.raises(GaveUp, match=said):
        app.train_ppo(config.model_copy(update={"num_rollout_workers": 1, "max_restarts": 0}))
    assert hunt.left == []
    done = len(read_metrics(app.run_folder(config)))
    assert (app.run_folder(config) / "latest").read_text() == f"step_{done:06d}\n" and 3 <= done < 8
    assert f"stopped after step {done}, workers having died" in (app.run_folder(config) / "log.txt").read_text()
    app.train_ppo(config)
    assert_same(config, whole)
