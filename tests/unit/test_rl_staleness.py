"""Generating ahead of learning: the loop of staleness 0, the correction of stale rows, and exact resume."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from worlds import Workers, make_world, policy_weights, ppo_config, stir

from rlhf_ray import app
from rlhf_ray.algorithms import ppo
from rlhf_ray.checkpoint import load_tree
from rlhf_ray.config import PPOConfig
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.ppo_inputs import read_inputs
from rlhf_ray.rl_run import RLRun
from rlhf_ray.roles import Roles
from rlhf_ray.run import Run, read_metrics
from rlhf_ray.types import Done, Rollout, concat
from rlhf_ray.workers.groups import GeneratorGroup, Given, LearnerGroup, LocalCrew, ReferenceGroup, RewardGroup
from rlhf_ray.workers.learner import LearnerWorker
from rlhf_ray.workers.rollout import RolloutWorker


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staleness")
    make_world(folder)
    return folder


def measured(config: PPOConfig) -> list[dict[str, Any]]:
    """A run's metrics without what the clock says."""
    rows = read_metrics(app.run_folder(config))
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def by_hand(config: PPOConfig) -> tuple[list[dict[str, float]], torch.Tensor]:
    """The same run as a few lines without roles, handles or a run: metrics and final policy.

    Batch b is sampled with the weights after max(0, b - k) updates.
    """
    workers = Workers.build(config)
    stream = PromptStream(len(workers.rollout.prompts), config.batch_size, seed=config.seed)
    size, rows, metrics = config.generation.shard_size, {}, []
    for step in range(config.total_steps):
        for batch in range(step, min(step + config.max_staleness + 1, config.total_steps)):
            if batch not in rows:
                cuts = range(0, config.batch_size, size)
                rows[batch] = [workers.rollout.generate(stream.take(batch).rows(a, a + size), step) for a in cuts]
        parts = [workers.judge(rollout) for rollout in rows.pop(step)]
        judged = concat(parts)
        experience, credited = ppo.credit(config.ppo, judged, config.kl.coef)
        if config.max_staleness:
            experience, corrected = ppo.correct(experience, config.ppo.importance_cap)
            credited |= corrected
        metrics.append({**credited, **workers.learner.update(experience)})
        workers.rollout.update_weights(workers.learner.weights(step + 1))
    return metrics, policy_weights(workers)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_run_is_its_loop_written_out_bit_for_bit(world: Path, staleness: int) -> None:
    config = ppo_config(world, run=f"loop-{staleness}", max_staleness=staleness, total_steps=4)
    app.train_ppo(config)
    expected, policy = by_hand(config)
    for row, by_hand_row in zip(measured(config), expected, strict=True):
        assert by_hand_row.items() <= row.items()
        assert ("importance/weight_mean" in row) == (staleness > 0)
    ages = [min(step, staleness) for step in range(4)]
    assert [(row["staleness/mean"], row["staleness/max"]) for row in measured(config)] == [(a, a) for a in ages]
    saved = Workers.build(config)
    saved.learner.load(app.run_folder(config) / "step_000004")
    assert torch.equal(policy_weights(saved), policy)


@dataclass(frozen=True, slots=True)
class Watched(Done[Rollout]):
    """Rows that nobody may wait for before the learner has come to their step."""

    step: int
    learner: LearnerWorker

    def result(self) -> Rollout:
        """The rows."""
        assert self.learner.step == self.step, f"batch {self.step} was waited for in step {self.learner.step}"
        return self.value


class WatchedCrew(LocalCrew):
    """A rollout worker whose rows are watched."""

    def __init__(self, worker: RolloutWorker, learner: LearnerWorker) -> None:
        super().__init__(worker)
        self.learner = learner

    def call(self, method: str, *arguments: Any, given: Given | None = None) -> Done[Any]:
        """Carry out the method."""
        return Watched(super().call(method, *arguments, given=given).value, arguments[0].step, self.learner)


def test_no_batch_is_waited_for_before_its_step(world: Path, tmp_path: Path) -> None:
    config = ppo_config(world, max_staleness=2, total_steps=4, save_every=9)
    workers, inputs = Workers.build(config), read_inputs(config)
    learner = LearnerGroup(LocalCrew(workers.learner))
    roles = Roles(
        generator=GeneratorGroup(WatchedCrew(workers.rollout, workers.learner), shard_size=5),
        reward=RewardGroup(LocalCrew(workers.reward)),
        reference=ReferenceGroup(LocalCrew(workers.reference)),
        learner=learner,
    )
    with Run.open(tmp_path / "run", {}, resume=True) as run:
        ppo.train(config, roles, RLRun(run, config, roles, learner, inputs.tokenizer, inputs.prompts))
    assert [row["staleness/max"] for row in read_metrics(tmp_path / "run")] == [0.0, 1.0, 2.0, 2.0]


def test_the_next_batch_comes_from_the_policy_before_the_update(world: Path) -> None:
    config = ppo_config(world, run="loop-1", max_staleness=1, total_steps=4)
    rows = measured(config)
    assert rows[0]["mismatch/max"] < 1e-5
    assert rows[0]["importance/weight_mean"] == pytest.approx(1, abs=1e-5)
    for row in rows[1:]:
        assert row["mismatch/max"] > 1e-3
        assert row["importance/ratio_max"] > 1.001
        assert 0 <= row["importance/truncated"] < 1
        assert row["val/first_ratio_error"] < 1e-5  # pi_old is the learner's own, however stale the rows


def test_a_cap_of_zero_leaves_stale_rows_as_they_are(world: Path) -> None:
    workers = Workers.build(ppo_config(world))
    experience = workers.experience()
    shifted = replace(experience, old_logprobs=experience.old_logprobs + 1.0)  # weights of e, truncated at 2
    plain, measured_plain = ppo.correct(shifted, 0.0)
    assert plain.importance_weights is None and measured_plain["importance/weight_mean"] == 1
    weighted, measured_weighted = ppo.correct(shifted, 2.0)
    mask = experience.rollout.response_mask
    assert weighted.importance_weights is not None and (weighted.importance_weights[mask] == 2).all()
    assert measured_weighted["importance/weight_mean"] == pytest.approx(2)
    assert measured_weighted["importance/ratio_max"] == pytest.approx(math.e, rel=1e-4)
    assert measured_weighted["importance/truncated"] == 1


def test_a_weight_scales_a_tokens_loss_and_its_gradient(world: Path) -> None:
    """With every weight 2 the policy's loss doubles; the critic's and the diagnostics stay."""
    config = ppo_config(
        world, ppo={"epochs": 1, "mini_batch_size": 12, "max_grad_norm": 0.0, "whiten_advantages": False}
    )
    plain, doubled = Workers.build(config), Workers.build(config)
    experience = plain.experience()
    twos = torch.full_like(experience.old_logprobs, 2.0)
    one = plain.learner.update(experience)
    two = doubled.learner.update(replace(experience, importance_weights=twos))
    for name, factor in {"loss/policy_avg": 2, "policy/grad_norm": 2, "loss/value_avg": 1, "val/ratio": 1}.items():
        assert two[name] == pytest.approx(factor * one[name], rel=1e-5), name


def test_rows_beyond_the_limit_or_from_the_future_are_never_trained_on(world: Path) -> None:
    rollout = Workers.build(ppo_config(world)).generate()
    ppo.check_staleness(rollout, 1, 1)
    for step in (2, -1):
        with pytest.raises(AssertionError, match="staleness"):
            ppo.check_staleness(rollout, step, 1)
    with pytest.raises(ValidationError, match="max_staleness"):
        ppo_config(world, max_staleness=5)


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_run_that_lost_its_last_steps_ends_the_same(world: Path, staleness: int) -> None:
    changes: dict[str, Any] = {"max_staleness": staleness, "total_steps": 5, "keep": 9}
    whole = ppo_config(world, run=f"whole-{staleness}", **changes)
    source = app.train_ppo(whole)
    again = ppo_config(world, run=f"again-{staleness}", **changes)
    folder = app.run_folder(again)
    shutil.copytree(source, folder)
    text = (source / "config.yaml").read_text(encoding="utf-8").replace(whole.run, again.run)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    for step in (3, 4, 5):
        shutil.rmtree(folder / f"step_00000{step}")
    saved = load_tree(folder / "step_000002" / "ahead")
    versions = [[int(shard["policy_version"][0]) for shard in batch] for batch in saved]
    assert versions == [[max(0, 2 + i - staleness)] * 3 for i in range(staleness)]
    app.train_ppo(again)
    assert measured(again) == measured(whole)
    ends = []
    for run in (source, folder):
        workers = Workers.build(whole)
        workers.learner.load(run / "step_000005")
        ends.append(policy_weights(workers))
    assert torch.equal(*ends)
    assert load_tree(folder / "step_000005" / "ahead") == []


def test_batches_that_a_stricter_limit_forbids_are_sampled_again(world: Path) -> None:
    config = ppo_config(world, run="stricter", max_staleness=2, total_steps=3)
    folder = app.train_ppo(config)
    shutil.rmtree(folder / "step_000003")
    stricter = config.model_copy(update={"max_staleness": 1, "allow_config_change": True, "total_steps": 4})
    app.train_ppo(stricter)
    assert [row["staleness/max"] for row in measured(stricter)] == [0.0, 1.0, 0.0, 1.0]


def test_a_policy_that_has_not_moved_needs_no_correction(world: Path) -> None:
    workers = Workers.build(ppo_config(world))
    experience, metrics = ppo.correct(workers.experience(), 2.0)
    mask = experience.rollout.response_mask
    assert experience.importance_weights is not None
    torch.testing.assert_close(experience.importance_weights[mask], torch.ones(int(mask.sum())), atol=1e-5, rtol=0)
    assert metrics["importance/truncated"] == 0
    stir(workers.learner.model.policy, scale=0.1)
    moved, metrics = ppo.correct(ppo.credit(workers.config.ppo, workers.judge(experience.rollout), 0.0)[0], 2.0)
    assert moved.importance_weights is not None and float(moved.importance_weights.max()) <= 2.0
    assert metrics["importance/ratio_max"] > 1.1
