"""Credit and the start-up checks of PPO, on what the real workers make."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from worlds import Workers, make_world, policy_weights, ppo_config, stir

from rlhf_ray.algorithms import ppo
from rlhf_ray.models.hf_weights import load_policy, save_policy
from rlhf_ray.ops.advantages import kl_shaped_rewards, last_token_index
from rlhf_ray.ppo_inputs import read_inputs
from rlhf_ray.rl_run import RLRun
from rlhf_ray.roles import Roles
from rlhf_ray.run import Run
from rlhf_ray.shortage import micro_batch
from rlhf_ray.types import Judged, select
from rlhf_ray.workers.groups import GeneratorGroup, LearnerGroup, LocalCrew, ReferenceGroup, RewardGroup
from rlhf_ray.workers.reference import ReferenceWorker


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    make_world(folder)
    return folder


def moved_judged(workers: Workers) -> Judged:
    """Opinions on rollouts whose policy is not the reference any more."""
    rollout = workers.generate()
    stir(workers.learner.model.policy)
    return workers.judge(rollout)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_at_step_0_the_kl_is_zero_and_the_reward_is_the_score_at_the_last_token(world: Path, critic: str) -> None:
    workers = Workers.build(ppo_config(world, ppo={"critic": critic}))
    judged = workers.judge(workers.generate())
    mask = judged.rollout.response_mask
    rewards, kl = kl_shaped_rewards(judged.scores, judged.evaluation.old_logprobs, judged.ref_logprobs, mask, 0.05)
    assert kl.abs().max() < 1e-6
    last = last_token_index(mask)
    rows = torch.arange(len(mask))
    torch.testing.assert_close(rewards[rows, last], judged.scores, atol=1e-6, rtol=0)
    rewards[rows, last] = 0
    assert rewards.abs().max() < 1e-7
    assert judged.scores.abs().min() > 1e-3
    ppo.check_first_kl(judged, 1e-3)


def test_the_learner_sees_what_the_generator_saw(world: Path) -> None:
    workers = Workers.build(ppo_config(world, generation={"temperature": 0.7}))
    judged = workers.judge(workers.generate())
    rollout = judged.rollout
    torch.testing.assert_close(judged.evaluation.old_logprobs, rollout.rollout_logprobs, atol=1e-5, rtol=0)
    assert (judged.evaluation.old_logprobs[rollout.response_mask] < 0).all()
    assert not judged.evaluation.old_logprobs[~rollout.response_mask].any()


def test_the_rewards_of_a_row_sum_to_its_score_less_the_price_of_its_kl(world: Path) -> None:
    # With gamma = lambda = 1 the first token's return is the sum of the row's rewards.
    workers = Workers.build(ppo_config(world, ppo={"gamma": 1.0, "gae_lambda": 1.0}))
    judged = moved_judged(workers)
    experience, metrics = ppo.credit(workers.config.ppo, judged, 0.3)
    mask = judged.rollout.response_mask
    kl = (judged.evaluation.old_logprobs - judged.ref_logprobs).sum(1)
    assert kl.abs().min() > 1e-3
    first = mask.int().argmax(1)
    assert experience.returns is not None
    total = experience.returns[torch.arange(len(mask)), first]
    torch.testing.assert_close(total, judged.scores - 0.3 * kl, atol=1e-5, rtol=0)
    assert metrics["objective/rlhf_reward"] == pytest.approx(float(total.mean()), abs=1e-5)
    assert metrics["objective/kl"] == pytest.approx(float(kl.mean()), abs=1e-5)
    assert metrics["objective/scores"] == pytest.approx(float(judged.scores.mean()), abs=1e-6)


def test_a_row_without_a_finite_score_counts_for_nothing(world: Path) -> None:
    workers = Workers.build(ppo_config(world))
    judged = moved_judged(workers)
    scores = judged.scores.clone()
    scores[[3, 7]] = torch.tensor([math.nan, math.inf])
    others = torch.tensor([i not in (3, 7) for i in range(len(scores))])
    for config in (workers.config.ppo, workers.config.ppo.model_copy(update={"whiten_rewards": True})):
        experience, metrics = ppo.credit(config, replace(judged, scores=scores), 0.3)
        alone, expected = ppo.credit(config, select(judged, others), 0.3)
        learned = select(experience, ppo.scored(scores))
        torch.testing.assert_close(learned.advantages, alone.advantages)
        torch.testing.assert_close(learned.returns, alone.returns)
        of_scores = ("objective/scores", "objective/scores_std", "objective/rlhf_reward", "val/explained_variance")
        assert [metrics[name] for name in of_scores] == pytest.approx([expected[name] for name in of_scores], rel=1e-5)
        assert (metrics["objective/unscored"], expected["objective/unscored"]) == (2, 0)
    nothing = replace(judged, scores=torch.full_like(scores, math.nan))
    experience, metrics = ppo.credit(config, nothing, 0.3)
    assert ppo.scored(nothing.scores).all() and metrics["objective/unscored"] == len(scores)
    assert experience.returns is not None and experience.returns[judged.rollout.response_mask].isnan().all()
    with pytest.raises(ValueError, match="at step 0 none of the 12 scores is a finite number, the first is nan"):
        ppo.check_first_scores(nothing)


def test_advantages_are_white_over_the_batch_and_returns_are_not(world: Path) -> None:
    workers = Workers.build(ppo_config(world))
    judged = moved_judged(workers)
    plain, _ = ppo.credit(workers.config.ppo.model_copy(update={"whiten_advantages": False}), judged, 0.05)
    white, _ = ppo.credit(workers.config.ppo, judged, 0.05)
    mask = judged.rollout.response_mask
    values = white.advantages[mask]
    assert float(values.mean()) == pytest.approx(0, abs=1e-6)
    assert float(values.var(correction=0)) == pytest.approx(1, abs=1e-4)
    assert plain.returns is not None and plain.values is not None and white.returns is not None
    torch.testing.assert_close(plain.returns, plain.advantages + plain.values)
    assert torch.equal(white.returns, plain.returns)
    assert not white.advantages[~mask].any()


def test_a_response_without_its_end_is_charged_by_either_rule(world: Path) -> None:
    workers = Workers.build(ppo_config(world))
    judged = workers.judge(workers.generate())
    finished = judged.rollout.finished
    assert 0 < int(finished.sum()) < len(finished)
    base = workers.config.ppo
    replaced = ppo.shape_scores(base.model_copy(update={"missing_eos_penalty": -3.0}), judged.scores, finished)
    assert torch.equal(replaced, torch.where(finished, judged.scores, torch.tensor(-3.0)))
    lowered = ppo.shape_scores(
        base.model_copy(update={"missing_eos_penalty": 2.0, "missing_eos": "subtract", "score_clip": 1.5}),
        judged.scores,
        finished,
    )
    expected = torch.where(finished, judged.scores, judged.scores - 2.0).clamp(-1.5, 1.5)
    assert torch.equal(lowered, expected)


def test_a_reference_that_is_another_policy_is_refused_and_nothing_is_trained(world: Path, tmp_path: Path) -> None:
    config = ppo_config(world, checkpoints=tmp_path)
    inputs = read_inputs(config)
    other = load_policy(inputs.policy)
    stir(other)
    special = {name: getattr(inputs.tokenizer, name) for name in ("pad_id", "bos_id", "eos_id")}
    save_policy(other, tmp_path / "other", **special)
    workers = Workers.build(config)
    reference = ReferenceWorker(
        tmp_path / "other", temperature=1.0, portion=micro_batch(4), device="cpu", dtype=torch.float32, threads=1
    )
    learner = LearnerGroup(LocalCrew(workers.learner))
    roles = Roles(
        generator=GeneratorGroup(LocalCrew(workers.rollout), shard_size=5),
        reward=RewardGroup(LocalCrew(workers.reward)),
        reference=ReferenceGroup(LocalCrew(reference)),
        learner=learner,
    )
    before = policy_weights(workers)
    with Run.open(tmp_path / "run", {}, resume=True) as run:
        rl_run = RLRun(run, config, roles, learner, inputs.tokenizer, inputs.prompts)
        with pytest.raises(
            ValueError, match=r"policy and reference differ by .* nats in a sequence \(allowed: 0\.001\)"
        ):
            ppo.train(config, roles, rl_run)
    assert torch.equal(policy_weights(workers), before)
    assert workers.learner.step == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert not list((tmp_path / "run").glob("step_*"))


def test_a_kl_that_is_not_a_number_is_refused(world: Path) -> None:
    workers = Workers.build(ppo_config(world))
    judged = workers.judge(workers.generate())
    with pytest.raises(ValueError, match="differ by nan nats"):
        ppo.check_first_kl(replace(judged, ref_logprobs=judged.ref_logprobs * float("nan")), 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_generator_that_samples_otherwise_than_the_learner_is_refused(world: Path, dtype: str) -> None:
    workers = Workers.build(ppo_config(world, generation={"dtype": dtype}))
    judged = workers.judge(workers.generate())
    ppo.check_first_mismatch(judged, dtype)
    colder = Workers.build(ppo_config(world, generation={"dtype": dtype, "temperature": 0.5}))
    with pytest.raises(ValueError, match=r"generator and learner differ by .* nats a token"):
        ppo.check_first_mismatch(workers.judge(colder.generate()), dtype)


def test_the_critic_may_start_from_the_reward_model_or_at_zero(world: Path, tmp_path: Path) -> None:
    from_reward = Workers.build(ppo_config(world))
    rollout = from_reward.generate()
    values = from_reward.learner.evaluate(rollout).values
    assert values is not None
    # V before the last response token is what the reward model says of the row without that token.
    last = last_token_index(rollout.response_mask)
    shortened = rollout.attention_mask.clone()
    shortened[torch.arange(len(last)), last] = False
    expected = from_reward.reward.score(replace(rollout, attention_mask=shortened))
    torch.testing.assert_close(values[torch.arange(len(last)), last], expected, atol=1e-5, rtol=0)
    (tmp_path / "f.py").write_text("def one(**row):\n    return 1\n", encoding="utf-8")
    for critic in ("separate", "shared"):
        config = ppo_config(world, reward=[f"{tmp_path / 'f.py'}:one"], ppo={"critic": critic})
        at_zero = Workers.build(config).learner.evaluate(rollout).values
        assert at_zero is not None and not at_zero.any()


def test_a_critic_of_another_vocabulary_or_too_short_a_context_is_refused(world: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((world / "reward" / "vocab.json").read_text(encoding="utf-8"))
    other = tmp_path / "other"
    other.mkdir()
    for file in (world / "reward").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    names = list(vocabulary)
    vocabulary[names[-1]], vocabulary[names[-2]] = vocabulary[names[-2]], vocabulary[names[-1]]
    (other / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(ValueError, match=r"critic_init = .*"):
        read_inputs(ppo_config(world, critic_init=other))
    settings = json.loads((world / "reward" / "config.json").read_text(encoding="utf-8"))
    (other / "vocab.json").write_bytes((world / "reward" / "vocab.json").read_bytes())
    (other / "config.json").write_text(json.dumps({**settings, "n_positions": 32}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"critic_init = .* reads 32 tokens and rows have up to 50"):
        read_inputs(ppo_config(world, critic_init=other))
