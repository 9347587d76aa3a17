"""The learner on real rollouts: the ratio of the first mini-batch, padding, and how a mini-batch is split."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import Workers, make_world, policy_weights, ppo_config, stir

from rlhf_ray.algorithms.ppo import credit
from rlhf_ray.crews import check_cards
from rlhf_ray.types import Experience, select
from rlhf_ray.workers.ranks import Ranks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learner")
    make_world(folder)
    return folder


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_first_mini_batch_has_ratio_one_and_clips_nothing(world: Path, critic: str) -> None:
    workers = Workers.build(ppo_config(world, ppo={"critic": critic, "epochs": 1, "mini_batch_size": 12}))
    metrics = workers.learner.update(workers.experience())
    assert metrics["policy/optimiser_steps"] == 1
    assert metrics["val/first_ratio_error"] < 1e-5
    assert metrics["val/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/clipfrac_avg"] == 0
    assert metrics["policy/approxkl_avg"] < 1e-10
    assert metrics["loss/policy_avg"] == pytest.approx(0.0, abs=1e-5)  # minus the mean of whitened advantages


def garbage(experience: Experience, filler: float) -> Experience:
    """The same experience with nonsense wherever nothing counts."""
    rollout = experience.rollout

    def outside(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(rollout.response_mask, x, filler)

    tokens = torch.where(rollout.attention_mask, rollout.tokens, torch.arange(rollout.tokens.shape[1]))
    rollout = replace(rollout, tokens=tokens, rollout_logprobs=outside(rollout.rollout_logprobs))
    names = ("old_logprobs", "advantages", "values", "returns")
    return replace(experience, rollout=rollout, **{name: outside(getattr(experience, name)) for name in names})


@pytest.mark.parametrize("filler", [1e4, float("nan")])
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_what_is_outside_the_response_changes_nothing(world: Path, critic: str, filler: float) -> None:
    config = ppo_config(world, ppo={"critic": critic, "entropy_coef": 0.01})
    clean, dirty = Workers.build(config), Workers.build(config)
    experience = clean.experience()
    assert not experience.rollout.attention_mask.all()  # there is padding to fill
    assert clean.learner.update(experience) == dirty.learner.update(garbage(experience, filler))
    assert torch.equal(policy_weights(clean), policy_weights(dirty))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_gradient_does_not_depend_on_the_micro_batches(world: Path, critic: str, aggregation: str) -> None:
    def moved(micro_batch_size: int, micro_batch_tokens: int = 0) -> tuple[Tensor, dict[str, float]]:
        # With an eps that dwarfs the gradient Adam's steps are a tenth of it; in the second, ratios differ from one.
        update = {"critic": critic, "aggregation": aggregation, "entropy_coef": 0.01, "max_grad_norm": 0.0}
        sizes = {"epochs": 2, "mini_batch_size": 12, "micro_batch_size": micro_batch_size}
        sizes["micro_batch_tokens"] = micro_batch_tokens
        workers = Workers.build(
            ppo_config(world, ppo={**update, **sizes, "lr": 1e2, "adam_eps": 1e3, "schedule": "constant"})
        )
        before = policy_weights(workers)
        experience = workers.experience()
        lengths = experience.rollout.response_lengths
        assert len(set(lengths.tolist())) > 3  # ragged
        metrics = workers.learner.update(experience)
        return policy_weights(workers) - before, metrics

    whole, whole_metrics = moved(12)
    assert whole.abs().max() > 1e-3 and whole_metrics["policy/approxkl_avg"] > 1e-6
    for size, tokens in ((1, 0), (2, 0), (5, 0), (12, 1), (12, 40)):
        part, metrics = moved(size, tokens)
        torch.testing.assert_close(part, whole, atol=2e-6, rtol=1e-4)
        assert metrics == pytest.approx(whole_metrics, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize(("size", "tokens"), [(1, 0), (2, 0), (12, 0), (12, 40)])
def test_ranks_take_each_row_once_and_equally_many_micro_batches(world: Path, size: int, tokens: int) -> None:
    rollout = Workers.build(ppo_config(world)).generate()
    lengths = rollout.attention_mask.sum(1)
    for rows, ranks in ((12, 1), (12, 5), (5, 2), (1, 3)):
        shares = [
            list(Ranks(rank=r, size=ranks).micro_batches(select(rollout, slice(rows)), size, tokens))
            for r in range(ranks)
        ]
        assert len({len(share) for share in shares}) == 1
        taken = [torch.cat([numbers for numbers, _ in share]) for share in shares]
        assert torch.cat(taken).sort().values.tolist() == list(range(rows))
        loads = [int(lengths[numbers].sum()) for numbers in taken]
        assert max(loads) - min(loads) <= int(lengths[:rows].max())
        for numbers, micro in (micro for share in shares for micro in share):
            assert len(micro) == max(1, len(numbers)) and micro.width == micro.tokens.shape[1]
            assert bool(micro.response_mask.any()) == (len(numbers) > 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_learners": 2}, "num_rollout_workers = 0 is without Ray: take at least one"),
        ({"sharding": "fsdp2"}, "sharding = fsdp2 needs several learners to hold a part each: num_learners is 1"),
    ],
)
def test_learners_that_can_not_be_are_refused(world: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ppo_config(world, **changes)


def test_two_learners_on_one_gpu_are_refused(world: Path) -> None:
    config = ppo_config(world, num_learners=2, num_rollout_workers=1)
    with pytest.raises(ValueError, match=r"num_learners = 2 need a GPU each; learner_gpus = 0\.4 lets two share one"):
        check_cards(config, "cuda")
    check_cards(config, "cpu")


def test_experience_of_other_weights_is_refused_before_anything_is_learned(world: Path) -> None:
    workers = Workers.build(ppo_config(world))
    experience = workers.experience()
    stir(workers.learner.model.policy)
    before = policy_weights(workers)
    with pytest.raises(ValueError, match=r"first mini-batch's ratio is .* away from one"):
        workers.learner.update(experience)
    assert torch.equal(policy_weights(workers), before)
    assert workers.learner.step == 0
    fresh = workers.learner.update(workers.experience())  # and no gradient of it is left behind
    assert fresh["val/first_ratio_error"] < 1e-5


def test_policy_and_critic_on_a_thread_each_learn_what_one_thread_would(world: Path) -> None:
    one, two = (Workers.build(ppo_config(world, learner_threads=threads)) for threads in (1, 2))
    experience = one.experience()
    again, values = two.learner.evaluate(experience.rollout), experience.values
    assert torch.equal(again.old_logprobs, experience.old_logprobs) and values is not None
    assert again.values is not None and torch.equal(again.values, values)
    assert one.learner.update(experience) == two.learner.update(experience)
    assert torch.equal(policy_weights(one), policy_weights(two))


@pytest.mark.parametrize("field", ["old_logprobs", "returns"])
def test_mini_batches_whose_loss_is_not_finite_never_reach_the_optimiser(world: Path, field: str) -> None:
    workers = Workers.build(ppo_config(world, ppo={"epochs": 1}))
    experience = workers.experience()
    values = getattr(experience, field).clone()
    before = policy_weights(workers)
    bad = replace(experience, **{field: torch.full_like(values, float("nan"))})
    metrics = workers.learner.update(bad)
    assert (metrics["update/skipped"], metrics["policy/optimiser_steps"]) == (2, 0)
    assert torch.equal(policy_weights(workers), before) and not workers.learner.optimiser.state
    workers.learner.step = 0
    values[0] = float("nan")  # a row of one of the two mini-batches
    metrics = workers.learner.update(replace(experience, **{field: values}))
    assert (metrics["update/skipped"], metrics["policy/optimiser_steps"]) == (1, 1)
    assert all(map(math.isfinite, metrics.values()))
    assert policy_weights(workers).isfinite().all() and not torch.equal(policy_weights(workers), before)


def test_the_learning_rate_falls_in_a_line_from_the_first_update_to_the_last(world: Path) -> None:
    workers = Workers.build(ppo_config(world, total_steps=4, ppo={"lr": 4e-4, "value_lr": 8e-4}))
    rates = []
    for _ in range(4):
        metrics = workers.learner.update(workers.experience())
        rates.append((metrics["policy/lr"], workers.learner.optimiser.param_groups[-1]["lr"]))
    assert rates == [pytest.approx(pair) for pair in ((4e-4, 8e-4), (3e-4, 6e-4), (2e-4, 4e-4), (1e-4, 2e-4))]


def test_every_epoch_of_every_step_is_shuffled_anew_and_takes_each_row_once(world: Path) -> None:
    workers = Workers.build(ppo_config(world, batch_size=12, ppo={"epochs": 3}))
    experience = workers.experience()
    orders = set()
    for step in (0, 1, 0):
        workers.learner.step = step
        halves = [mini.rollout.group_ids.tolist() for mini in workers.learner._mini_batches(experience)]
        epochs = [tuple(sorted(halves[i])) for i in (0, 2, 4)]
        assert [sorted(halves[i] + halves[i + 1]) for i in (0, 2, 4)] == [list(range(12))] * 3
        orders |= {*epochs}
    assert len(orders) == 6  # step 0 taken again is the same


def test_the_epochs_are_left_when_the_update_goes_too_far(world: Path) -> None:
    free = Workers.build(ppo_config(world, ppo={"epochs": 4, "lr": 1e-2}))
    assert free.learner.update(free.experience())["policy/optimiser_steps"] == 8
    bound = Workers.build(ppo_config(world, ppo={"epochs": 4, "lr": 1e-2, "target_update_kl": 1e-3}))
    assert bound.learner.update(bound.experience())["policy/optimiser_steps"] == 2


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_critic_learns_what_a_prompt_is_worth(world: Path, tmp_path: Path, critic: str) -> None:
    """The score is a fact about the prompt, so a critic that is read at the right place can know it beforehand."""
    (tmp_path / "f.py").write_text("def f(number, **row):\n    return number / 4 - 1\n", encoding="utf-8")
    update = {"critic": critic, "lr": 1e-9, "value_lr": 1e-2, "value_clip": 0.0, "value_coef": 1.0, "epochs": 8}
    if critic == "shared":  # the trunk must move for the head to see the prompt
        update |= {"lr": 3e-3, "value_coef": 100.0, "whiten_advantages": False}
    config = ppo_config(
        world, reward=[f"{tmp_path / 'f.py'}:f"], batch_size=27, total_steps=9, ppo={**update, "schedule": "constant"}
    )
    workers = Workers.build(config)
    explained = []
    for _ in range(9):
        experience, metrics = credit(config.ppo, workers.judge(workers.generate()), 0.0)
        explained.append(metrics["val/explained_variance"])
        workers.learner.update(experience)
    assert explained[0] < 0.05 and explained[-1] > 0.7
