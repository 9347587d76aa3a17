"""Whole runs on toy rewards: PPO finds what is rewarded, and the KL controller holds its target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from worlds import make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.run import read_metrics


def run(folder: Path, reward: str, **changes: Any) -> list[dict[str, Any]]:
    """The metrics of every step of a run with a Python function for its reward."""
    (folder / "reward.py").write_text(f"def reward(response, **row):\n    return {reward}\n", encoding="utf-8")
    config = ppo_config(folder, reward=[f"{folder / 'reward.py'}:reward"], save_every=1000, sample_rows=0, **changes)
    app.train_ppo(config)
    return read_metrics(app.run_folder(config))


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_counting_a_letter_is_solved(tmp_path: Path, seed: int) -> None:
    make_world(tmp_path)
    update = {"mini_batch_size": 16, "micro_batch_size": 16, "epochs": 4, "lr": 1e-2}
    rows = run(
        tmp_path,
        "response.count('a')",
        seed=seed,
        total_steps=25,
        batch_size=32,
        kl={"coef": 0.0},
        generation={"shard_size": 32},
        ppo={**update, "schedule": "constant", "critic": "shared"},
    )
    assert rows[0]["objective/scores"] < 1
    # Ten tokens, nearly all of them an "a": the policy has learned the letter, and not to stop early.
    assert mean(rows[-3:], "objective/scores") > 8
    assert mean(rows[-3:], "response_length/mean") > 9


def test_the_adaptive_kl_settles_at_its_target(tmp_path: Path) -> None:
    make_world(tmp_path, eos_logit=-20.0)  # no length to trade the divergence against
    update = {"mini_batch_size": 64, "micro_batch_size": 64, "epochs": 3, "lr": 7e-3, "value_lr": 1e-2}
    rows = run(
        tmp_path,
        "4.0 * ('a' in response)",
        total_steps=50,
        batch_size=128,
        kl={"coef": 1.3, "adaptive": True, "target": 1.0, "horizon": 800},
        generation={"response_length": 2, "shard_size": 128},
        ppo={**update, "schedule": "constant"},
    )
    assert mean(rows[:4], "objective/kl") < 0.5
    assert max(row["objective/kl"] for row in rows) > 1.15  # it goes past the target, and is brought back
    assert mean(rows[-30:], "objective/kl") == pytest.approx(1.0, rel=0.05)
    assert mean(rows[-30:], "objective/kl_coef") > 1.3
    assert mean(rows[-30:], "objective/scores") > 2 * rows[0]["objective/scores"]
