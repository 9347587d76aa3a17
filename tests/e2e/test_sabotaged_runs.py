"""Runs with one thing wrong, from command line to report: the doctor names it, and leaves a healthy run alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from worlds import make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.checkpoint import load_tree
from rlhf_ray.cli import main
from rlhf_ray.config import PPOConfig
from rlhf_ray.doctor import Finding, diagnose
from rlhf_ray.doctor.rules import TIMED
from rlhf_ray.report.text import escape
from rlhf_ray.run import read_metrics
from rlhf_ray.types import Weights
from rlhf_ray.workers.rollout import RolloutWorker

REWARDS = """
def sound(response, **row):
    return response.count("e") - abs(len(response) - 25) / 10

def long(response, **row):
    return len(response) / 10

def brief(response, **row):
    return -len(response)

def gaps(response, number, **row):
    return float("nan") if number == 4 else sound(response)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, prompts, rewards and the settings of a run that is well."""
    folder = tmp_path_factory.mktemp("sabotage")
    make_world(folder)
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    update = {"lr": 1e-3, "mini_batch_size": 16, "micro_batch_size": 16}
    config = ppo_config(folder, batch_size=32, total_steps=12, save_every=4, ppo=update)
    settings = json.loads(config.model_dump_json(exclude_unset=True, exclude={"rewards", "report"}))
    (folder / "ppo.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


def ppo(world: Path, name: str, *flags: str, reward: str = "sound") -> tuple[int, Path]:
    """A run from its command line; its exit code and folder."""
    arguments = ["--config", str(world / "ppo.yaml"), "--run", name, "--reward", f"{world}/rewards.py:{reward}"]
    code = main(PPOConfig, "", None, app.train_ppo, [*arguments, *flags])
    return code, world / "checkpoints" / "ppo" / name


def findings(folder: Path, said: str) -> dict[str, Finding]:
    """What the doctor found by rule; each on the terminal, in metrics.jsonl and in the report.

    Rules that read the clock are left out: who waits for whom is up to what else the machine does.
    """
    rows = read_metrics(folder)
    found = {finding.rule: finding for finding in diagnose(rows) if finding.rule not in TIMED}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert ("But the doctor found" in page) == any(finding.severity != "note" for finding in found.values())
    for rule, finding in found.items():
        assert f"doctor: {rule} at step" in said and escape(finding.sentence[1:]) in page
        assert any(f"doctor/{rule}" in row for row in rows)
    return found


def test_a_healthy_run_is_let_alone(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = ppo(world, "healthy")
    said = capsys.readouterr().out
    assert (code, findings(folder, said)) == (0, {})
    assert {line.split()[1] for line in said.splitlines() if line.startswith("doctor: ")} <= TIMED


def test_a_hundred_times_the_learning_rate(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = ppo(world, "hot", "--ppo.lr", "0.1", "--on-divergence", "stop")
    found = findings(folder, capsys.readouterr().out)
    assert code == 4 and found["kl_explosion"].first_step == read_metrics(folder)[-1]["step"] < 6
    assert set(found) <= {"kl_explosion", "clip_fraction"}


def test_a_reward_that_likes_length_without_a_price_on_kl(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An independent judge tells a gamed reward from a better policy, and has no part in the run."""
    flags = ["--kl.coef", "0", "--ppo.lr", "3e-3", "--total-steps", "24"]
    code, folder = ppo(world, "gamed", *flags, "--judges", f"{world}/rewards.py:brief", reward="long")
    found = findings(folder, capsys.readouterr().out)
    assert code == 0 and set(found) >= {"reward_hacking", "high_kl"}
    assert "the score rises while judge/brief falls" in found["reward_hacking"].sentence
    _, plain = ppo(world, "plain", *flags, "--total-steps", "1", "--no-report", reward="long")
    own = ("judge/", "time/", "perf/", "doctor/")
    judged, alone = [
        {name: x for name, x in read_metrics(run)[0].items() if not name.startswith(own)} for run in (folder, plain)
    ]
    assert judged == alone


def test_a_divergence_is_rolled_back_and_the_run_ends_well(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--kl.coef", "0", "--ppo.lr", "2e-2", "--on-divergence", "rollback", "--kl.rollback-factor", "100"]
    code, folder = ppo(world, "rescued", *flags, "--save-every", "20", reward="long")
    said = capsys.readouterr().out
    rows, found = read_metrics(folder), findings(folder, said)
    assert code == 0 and said.count("with a higher KL coefficient: the run has diverged: kl_explosion") == 1
    assert "going back to step_000000" in said and found["rolled_back"].first_step == 1
    assert [(row["doctor/rollbacks"], row["objective/kl_coef"]) for row in rows] == [(1, 1.0)] * 12
    assert not [finding for finding in found.values() if finding.severity == "divergence"]
    assert max(row["objective/kl"] for row in rows) < 6


def test_a_reward_that_is_not_a_number_for_some_answers(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are said, counted and kept, and the run learns from the others."""
    code, folder = ppo(world, "gaps", "--total-steps", "4", reward="gaps")
    said = capsys.readouterr().out
    assert (code, set(findings(folder, said))) == (0, {"reward_not_finite"})
    assert said.count("rewards.py:gaps returned nan for the answer") == 1
    rows, kept = read_metrics(folder), load_tree(folder / "skipped" / "step_000001")
    assert kept["scores"].isnan().equal(kept["prompt_ids"] == 4)
    assert rows[0]["objective/unscored"] == kept["scores"].isnan().sum() > 0
    assert [(row["update/skipped"], row["policy/optimiser_steps"]) for row in rows] == [(0, 4)] * 4


def test_weights_that_do_not_reach_the_generators(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their version does, so that nothing but the rows' log-probabilities can tell."""
    take = RolloutWorker.update_weights

    def withheld(worker: RolloutWorker, weights: Weights) -> None:
        if weights.policy_version == 0:
            take(worker, weights)
        worker.policy_version = weights.policy_version

    monkeypatch.setattr(RolloutWorker, "update_weights", withheld)
    code, folder = ppo(world, "withheld", "--total-steps", "5")
    found = findings(folder, capsys.readouterr().out)
    assert code == 0 and found["generator_mismatch"].first_step <= 4
    assert set(found) <= {"generator_mismatch", "negative_kl"}  # of a policy that did not say what it learns from
