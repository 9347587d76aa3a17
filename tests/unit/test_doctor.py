"""The doctor: silent about a healthy run, and every rule fires on a history with its fault; what a divergence does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import Workers, make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.algorithms.ppo import credit
from rlhf_ray.checkpoint import load_tree
from rlhf_ray.cli import main
from rlhf_ray.config import PPOConfig
from rlhf_ray.doctor import Doctor, command, diagnose
from rlhf_ray.doctor.rules import RULES
from rlhf_ray.failures import Diverged
from rlhf_ray.health import MOST_DUMPS, Health
from rlhf_ray.ops.kl import raised
from rlhf_ray.ops.repetition import distinct_rows, repeated_ngrams
from rlhf_ray.run import Run, read_metrics

BEGAN = 20
"""Step at which a fault begins."""
Row = dict[str, float]

# First value, last value and noise of each metric of the shipped demo's PPO run of 50 steps.
DEMO = {
    "objective/scores": (0.17, 1.1, 0.05),
    "objective/scores_std": (1.04, 0.85, 0.05),
    "objective/kl": (0.0, 2.87, 0.0),
    "objective/entropy": (0.34, 0.26, 0.02),
    "objective/eos_rate": (0.98, 1.0, 0.0),
    "response_length/mean": (15.6, 12.9, 0.3),
    "response/repetition": (0.01, 0.01, 0.005),
    "response/distinct": (0.95, 0.8, 0.03),
    "mismatch/mean": (5.7e-7, 4.9e-7, 5e-8),
    "loss/policy_avg": (-0.014, -0.001, 0.003),
    "loss/value_avg": (1.6, 0.03, 0.01),
    "policy/clipfrac_avg": (0.03, 0.0, 0.0),
    "val/ratio": (1.007, 1.0, 0.001),
    "policy/grad_norm": (1.04, 1.23, 0.3),
    "critic/grad_norm": (0.46, 0.05, 0.02),
    "val/first_ratio_error": (0.0, 0.0, 0.0),
    "policy/optimiser_steps": (8.0, 8.0, 0.0),
    "update/skipped": (0.0, 0.0, 0.0),
    "objective/unscored": (0.0, 0.0, 0.0),
    "staleness/max": (0.0, 0.0, 0.0),
    "perf/busy_share/learner": (0.94, 0.94, 0.02),
    "perf/busy_share/generator": (0.07, 0.1, 0.01),
}


def healthy(steps: int = 50) -> list[Row]:
    """The demo's run: metrics go the way of the square root from their first value to their last."""
    rows = []
    for i in range(steps):
        done = math.sqrt(i / 49)
        wave = math.sin(7.3 * i)
        row = {name: a + (b - a) * done + noise * wave for name, (a, b, noise) in DEMO.items()}
        row["val/explained_variance"] = 0.91 - 3.9 * math.exp(-i / 2)  # negative for three steps
        rows.append({"step": i + 1, **row})
    return rows


def becomes(name: str, value: float | Callable[[Row], float]) -> Callable[[Row], Row]:
    """The fault of a metric that is something else from its beginning on."""
    return lambda row: row if row["step"] < BEGAN else row | {name: value(row) if callable(value) else value}


def once(name: str, value: float, step: int = BEGAN) -> Callable[[Row], Row]:
    """The fault of one step."""
    return lambda row: row | {name: value} if row["step"] == step else row


def both(one: Callable[[Row], Row], other: Callable[[Row], Row]) -> Callable[[Row], Row]:
    return lambda row: other(one(row))


FAULTS: dict[str, Callable[[Row], Row]] = {
    "no_finite_update": both(becomes("update/skipped", 8), becomes("policy/optimiser_steps", 0)),
    "kl_explosion": becomes("objective/kl", lambda row: 3 * 1.6 ** (row["step"] - BEGAN)),
    "collapse": becomes("response/distinct", 0.02),
    "not_finite": once("loss/policy_avg", math.nan),
    "skipped_update": once("update/skipped", 1),
    "reward_not_finite": once("objective/unscored", 3),
    "rolled_back": becomes("doctor/rollbacks", 1),
    "negative_kl": becomes("objective/kl", -2.0),
    "high_kl": becomes("objective/kl", 9.0),
    "first_kl": once("objective/kl", 0.8, step=1),
    "ratio": becomes("val/ratio", 1.3),
    "reward_hacking": becomes("judge/score", lambda row: 2 - row["step"] / 50),
    "length_drift": becomes("response_length/mean", lambda row: row["step"]),
    "repetition": becomes("response/repetition", 0.4),
    "entropy_collapse": becomes("objective/entropy", 0.03),
    "entropy_rise": becomes("objective/entropy", 4.0),
    "no_eos": becomes("objective/eos_rate", 0.02),
    "eos_at_once": becomes("response_length/mean", 1.0),
    "critic": becomes("val/explained_variance", -0.4),
    "clip_fraction": becomes("policy/clipfrac_avg", 0.45),
    "flat_rewards": becomes("objective/scores_std", 0.0),
    "no_progress": lambda row: row | {"objective/scores": 0.17},
    "generator_mismatch": becomes("mismatch/mean", 0.08),
    "stale_weights": both(becomes("importance/truncated", 0.3), becomes("staleness/max", 2)),
    "spike": once("policy/grad_norm", 40.0),
    "starved_learner": becomes("perf/busy_share/learner", 0.1),
    "starved_generators": becomes("perf/busy_share/generator", 0.005),
}
ALSO = {
    "no_finite_update": {"skipped_update"},
    "kl_explosion": {"high_kl"},
    "eos_at_once": {"length_drift"},
}
"""What else such a fault rightly shows."""


def test_a_healthy_run_has_no_finding() -> None:
    assert diagnose(healthy()) == []
    assert diagnose([{"step": 1, "loss": 3.0, "eval/loss": 2.0}]) == []  # nor one that logs none of its metrics


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_every_rule_fires_on_its_fault_and_no_other_does(rule: str) -> None:
    findings = diagnose(map(FAULTS[rule], healthy()))
    assert {finding.rule for finding in findings} == {rule} | ALSO.get(rule, set())
    for finding in findings:
        assert finding.first_step >= BEGAN or rule == "first_kl"
        assert finding.first_step <= finding.last_step <= 50 and finding.sentence and finding.remedy in str(finding)
        assert "nan" not in finding.sentence or rule == "not_finite"


NEARLY: dict[str, Callable[[Row], Row]] = {
    "no_finite_update": both(becomes("update/skipped", 7), becomes("policy/optimiser_steps", 1)),
    "kl_explosion": both(becomes("objective/kl", 15.0), becomes("response_length/mean", 15.5)),
    "collapse": both(becomes("response/distinct", 0.06), becomes("objective/entropy", 0.0035)),
    "not_finite": once("time/step", math.inf),  # says nothing of how the model does
    "skipped_update": once("update/skipped", 0),
    "reward_not_finite": once("objective/unscored", 0),
    "rolled_back": becomes("doctor/rollbacks", 0),
    "negative_kl": once("objective/kl", -1.0),
    "high_kl": both(becomes("objective/kl", 6.0), becomes("response_length/mean", 13.0)),
    "first_kl": once("objective/kl", 0.4, step=1),
    "ratio": both(becomes("val/ratio", 1.09), becomes("val/first_ratio_error", 0.25)),
    "reward_hacking": becomes("judge/score", lambda row: 1 + math.sin(row["step"])),
    "length_drift": becomes("response_length/mean", 20.0),
    "repetition": becomes("response/repetition", 0.19),
    "entropy_collapse": becomes("objective/entropy", 0.07),
    "entropy_rise": becomes("objective/entropy", 1.2),
    "no_eos": becomes("objective/eos_rate", 0.12),
    "eos_at_once": becomes("response_length/mean", 1.6),
    "critic": lambda row: row | {"val/explained_variance": -0.4} if BEGAN <= row["step"] < BEGAN + 9 else row,
    "clip_fraction": becomes("policy/clipfrac_avg", 0.28),
    "flat_rewards": once("objective/scores_std", 0.0),
    "no_progress": lambda row: row | {"objective/scores": 0.17 + 0.003 * row["step"]},
    "generator_mismatch": becomes("mismatch/mean", 0.018),
    "stale_weights": both(becomes("importance/truncated", 0.09), becomes("staleness/max", 2)),
    "spike": once("policy/grad_norm", 9.0),
    "starved_learner": becomes("perf/busy_share/learner", 0.27),
    "starved_generators": becomes("perf/busy_share/generator", 0.022),
}
"""What is not yet the fault: a value within its limit, or one that does not last."""


def test_no_rule_fires_just_within_its_limit() -> None:
    for rule in RULES:
        assert rule.name not in {finding.rule for finding in diagnose(map(NEARLY[rule.name], healthy()))}


def test_a_finding_is_one_for_as_long_as_it_lasts_and_a_resumed_doctor_remembers() -> None:
    bad = {10, 11, 12, 14, 15, 16, 40, 41, 42}
    rows = [row | {"objective/eos_rate": 0.0} if row["step"] in bad else row for row in healthy()]
    findings = diagnose(rows)
    assert [(f.rule, f.first_step, f.last_step) for f in findings] == [("no_eos", 12, 16), ("no_eos", 42, 42)]
    halved = Doctor(rows[:15])
    shown = [halved.see(row) for row in rows[15:]]
    assert halved.findings == findings
    assert [[f.first_step for f in found] for found in shown[:2]] == [[12], []]  # it goes on, then it is away


def test_the_page_describes_every_rule(repository: Path) -> None:
    page = (repository / "docs" / "DOCTOR.md").read_text(encoding="utf-8")
    for rule in RULES:
        line = next(line for line in page.splitlines() if line.startswith(f"| `{rule.name}` |"))
        assert rule.severity in line and rule.cause in line and rule.remedy in line


def test_repetition_is_counted_within_answers_and_between_them() -> None:
    tokens = torch.tensor([[9, 1, 2, 3, 1, 2, 3, 1], [9, 9, 1, 2, 3, 4, 5, 6], [1, 2, 3, 1, 2, 3, 1, 2]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]]).bool()
    assert repeated_ngrams(tokens, mask).tolist() == pytest.approx([2 / 5, 0, 0])
    assert repeated_ngrams(tokens[:, :2], mask[:, :2]).tolist() == [0, 0, 0]
    again = torch.tensor([[7, 7, 7, 1, 2, 3, 4, 5]]), torch.tensor([[False] * 3 + [True] * 5])
    assert distinct_rows(torch.cat([tokens, again[0]]), torch.cat([mask, again[1]])) == 1.0
    assert distinct_rows(torch.cat([tokens, tokens]), torch.cat([mask, mask])) == 0.5


# ---- what a divergence does


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    make_world(folder)
    return folder


def wild(world: Path, **changes: Any) -> PPOConfig:
    """A run that leaves its reference at the first update."""
    return ppo_config(world, total_steps=9, save_every=1, keep=9, ppo={"lr": 0.3, "schedule": "constant"}, **changes)


def test_stop_ends_a_run_that_diverges_and_saves_nothing_of_the_step(world: Path) -> None:
    config = wild(world, run="stop", on_divergence="stop")
    with pytest.raises(Diverged, match=r"the run has diverged: collapse at step 4: entropy is") as caught:
        app.train_ppo(config)
    rows = read_metrics(app.run_folder(config))
    assert rows[-1]["doctor/collapse"] == 1 and rows[-1]["step"] == caught.value.step
    assert not (app.run_folder(config) / f"step_{caught.value.step:06d}").exists()
    assert [f.rule for f in diagnose(rows) if f.severity == "divergence"] == ["collapse"]
    assert command.main([str(app.run_folder(config))]) == 4


def test_rollback_goes_back_twice_with_a_higher_kl_coefficient_and_then_stops(world: Path) -> None:
    config = wild(world, run="rollback", on_divergence="rollback", kl={"coef": 0.0, "rollback_factor": 3.0})

    def run(_: PPOConfig) -> None:
        app.train_ppo(config)

    assert main(PPOConfig, "", None, run, ["--num-rollout-workers", "0"]) == 4
    folder = app.run_folder(config)
    log = (folder / "log.txt").read_text()
    assert log.count("going back to step_000000 with a higher KL coefficient") == 2
    rows = read_metrics(folder)
    assert [row["objective/kl_coef"] for row in rows] == pytest.approx([0.01 * 9] * 4)  # of the last course alone
    assert [row["doctor/rollbacks"] for row in rows] == [2] * 4
    newest = max(folder.glob("step_*"))
    assert load_tree(newest / "run")["tracked"]["health"] == {"rollbacks": 2}


def test_a_coefficient_of_nothing_can_be_raised() -> None:
    assert raised(0.05, 2.0, 0) == 0.05 and raised(0.05, 2.0, 2) == pytest.approx(0.2)
    assert raised(0.0, 2.0, 0) == 0.0 and raised(0.0, 2.0, 1) == pytest.approx(0.02)


OVERFLOWING = """
asked = 0

def score(number, **row):
    global asked
    asked += 1
    return 1e30 if asked == 20 else number % 3
"""


def test_a_run_goes_on_over_a_batch_whose_loss_is_not_finite(world: Path, tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(OVERFLOWING, encoding="utf-8")  # in the second step of 12 rows
    config = ppo_config(world, run="overflowing", reward=[f"{tmp_path}/score.py:score"])
    folder = app.train_ppo(config)
    rows = read_metrics(folder)
    assert [row["update/skipped"] for row in rows] == [0, 2, 0]  # one in each epoch
    assert [row["policy/optimiser_steps"] for row in rows] == [4, 2, 4]
    assert rows[1]["doctor/skipped_update"] == rows[1]["doctor/not_finite"] == 1 and math.isfinite(
        rows[2]["objective/kl"]
    )
    kept = load_tree(folder / "skipped" / "step_000002")
    assert (kept["scores"] == 1e30).sum() == 1 and kept["advantages"].shape == kept["tokens"].shape


def test_rows_that_no_update_was_made_from_are_kept_for_a_few_steps(world: Path, tmp_path: Path) -> None:
    config = ppo_config(world)
    workers = Workers.build(config)
    judged = workers.judge(workers.generate())
    experience, _ = credit(config.ppo, judged, 0.05)
    with Run.open(tmp_path / "run", {}, resume=False) as run:
        health = Health(run, config, rollbacks=0)
        for step in range(1, 6):
            health.keep(step, judged, experience)
        run.sync()
        names = sorted(path.name for path in health.skipped.glob("*.safetensors"))
        assert names == [f"step_00000{step}.safetensors" for step in range(1, 1 + MOST_DUMPS)]
        kept = load_tree(health.skipped / "step_000001")
        assert torch.equal(kept["scores"], judged.scores) and torch.equal(kept["advantages"], experience.advantages)
        health.resume_at(1)  # steps 2 and 3 will be taken again
        assert sorted(path.name for path in health.skipped.glob("*.safetensors")) == names[:1]
        health.load_state_dict({"rollbacks": 1})
        assert health.see(7, {"update/skipped": 2}) == {
            "doctor/rollbacks": 1.0,
            "doctor/skipped_update": 1.0,
            "doctor/rolled_back": 1.0,
        }


def test_a_judge_that_can_not_be_asked_is_refused_before_workers_start(world: Path, tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text("def brief(response, **row):\n    return -len(response)\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"judges = .*has no function other"):
        app.train_ppo(ppo_config(world, run="refused", judges=[f"{tmp_path}/score.py:other"]))
