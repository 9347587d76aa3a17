"""Rollout workers: the same rows however they are shared out, masks that end where the response ends."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import Workers, make_world, policy_weights, ppo_config, stir

from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.ops.advantages import last_token_index
from rlhf_ray.types import PromptBatch, Rollout, columns, concat
from rlhf_ray.workers.groups import GeneratorGroup, LocalCrew


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollout")
    make_world(folder)
    return folder


def batch_of(workers: Workers, *, step: int = 0, size: int = 12, group_size: int = 1) -> PromptBatch:
    return PromptStream(len(workers.rollout.prompts), size, group_size=group_size, seed=0).take(step)


def assert_same_rows(one: Rollout, other: Rollout) -> None:
    width = one.width
    assert other.width == width
    one, other = columns(one, slice(width)), columns(other, slice(width))
    for name in ("tokens", "attention_mask", "response_mask", "prompt_ids", "group_ids", "finished"):
        a, b = getattr(one, name), getattr(other, name)
        if name == "tokens":
            a, b = a * one.attention_mask, b * other.attention_mask
        assert torch.equal(a, b), name
    torch.testing.assert_close(one.rollout_logprobs, other.rollout_logprobs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("cuts", [(0, 5, 12), (0, 1, 2, 12), (0, 11, 12), tuple(range(13))])
def test_rows_do_not_depend_on_the_split(world: Path, cuts: tuple[int, ...]) -> None:
    workers = Workers.build(ppo_config(world))
    batch = batch_of(workers)
    whole = workers.rollout.generate(batch, 0)
    parts = [workers.rollout.generate(batch.rows(a, b), 0) for a, b in pairwise(cuts)]
    assert_same_rows(whole, concat(parts))


@pytest.mark.parametrize("shard_size", [1, 5, 12, 100])
def test_rows_do_not_depend_on_the_shard_size(world: Path, shard_size: int) -> None:
    workers = Workers.build(ppo_config(world, generation={"shard_size": shard_size}))
    batch = batch_of(workers)
    shards = GeneratorGroup(LocalCrew(workers.rollout), shard_size=shard_size).generate(batch, 0)
    assert len(shards) == -(-12 // shard_size)
    rows = concat([handle.result() for handle in shards.handles])
    assert_same_rows(Workers.build(ppo_config(world)).rollout.generate(batch, 0), rows)


def test_another_step_seed_or_row_draws_other_tokens(world: Path) -> None:
    workers = Workers.build(ppo_config(world, batch_size=12))
    batch = batch_of(workers, group_size=12)  # one prompt, twelve siblings
    rows = workers.rollout.generate(batch, 0)
    assert len({tuple(row[mask].tolist()) for row, mask in zip(rows.tokens, rows.response_mask, strict=True)}) > 6
    later = workers.rollout.generate(replace(batch, step=1), 0)
    assert not np.array_equal(rows.tokens, later.tokens)
    reseeded = Workers.build(ppo_config(world, seed=1)).rollout.generate(batch, 0)
    assert not np.array_equal(rows.tokens, reseeded.tokens)


def test_a_response_ends_with_its_first_eos(world: Path) -> None:
    rows = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, ' + (
        '{"role": "user", "content": "the dog ran"}]}\n'
    )
    (world / "dialogue.jsonl").write_text(rows, encoding="utf-8")
    workers = Workers.build(ppo_config(world, prompts=world / "dialogue.jsonl", batch_size=96))
    rollout = workers.generate()
    eos, pad = workers.rollout.engine.eos_id, workers.rollout.pad_id
    prompt = len(workers.rollout.prompts.token_ids[0])
    assert eos in workers.rollout.prompts.token_ids[0]  # one inside the prompt ends nothing
    last = last_token_index(rollout.response_mask)
    cases = set()
    for b in range(len(rollout)):
        length = int(rollout.response_lengths[b])
        response = rollout.tokens[b, prompt : prompt + length].tolist()
        assert rollout.response_mask[b].nonzero().flatten().tolist() == list(range(prompt, prompt + length))
        assert rollout.attention_mask[b].nonzero().flatten().tolist() == list(range(prompt + length))
        assert set(rollout.tokens[b, prompt + length :].tolist()) <= {pad}
        assert bool(rollout.finished[b]) == (response[-1] == eos)
        assert eos not in response[:-1]
        assert int(last[b]) == prompt + length - 1
        cases.add((length == 1, length == 10, bool(rollout.finished[b])))
        if not rollout.finished[b]:
            assert length == 10
    # EOS at once, in the middle, as the last token that there is room for, and none at all.
    assert {(True, False, True), (False, False, True), (False, True, True), (False, True, False)} <= cases


def test_groups_carry_the_numbers_of_their_prompts(world: Path) -> None:
    workers = Workers.build(ppo_config(world))
    batch = batch_of(workers, step=2, group_size=3)
    rollout = workers.rollout.generate(batch.rows(4, 9), 0)
    assert rollout.prompt_ids.tolist() == batch.prompt_ids[4:9].tolist()
    assert rollout.group_ids.tolist() == [9, 9, 10, 10, 10]
    for tokens, prompt in zip(rollout.tokens.tolist(), rollout.prompt_ids.tolist(), strict=True):
        ids = list(workers.rollout.prompts.token_ids[prompt])
        assert tokens[: len(ids)] == ids


def test_another_policy_than_the_one_asked_for_is_refused(world: Path) -> None:
    workers = Workers.build(ppo_config(world))
    with pytest.raises(AssertionError, match="holds policy version 0, asked to sample with 1"):
        workers.rollout.generate(batch_of(workers).rows(0, 2), 1)


def test_new_weights_are_the_learners_and_stamp_every_row(world: Path) -> None:
    workers = Workers.build(ppo_config(world))
    stir(workers.learner.model.policy)
    workers.rollout.update_weights(workers.learner.weights(7))
    held = torch.cat([p.flatten() for p in workers.rollout.policy.parameters()])
    assert torch.equal(held, policy_weights(workers))
    rollout = workers.rollout.generate(batch_of(workers), 7)
    assert rollout.policy_version.tolist() == [7] * 12
    old_logprobs = workers.learner.evaluate(rollout).old_logprobs
    torch.testing.assert_close(old_logprobs, rollout.rollout_logprobs, atol=1e-5, rtol=0)


def test_altered_weights_are_refused_and_the_old_ones_stay(world: Path) -> None:
    workers = Workers.build(ppo_config(world))
    before = policy_weights(workers)
    stir(workers.learner.model.policy)
    weights = workers.learner.weights(1)
    buffer = weights.buffer.copy()
    buffer[17] += 1e-3
    with pytest.raises(AssertionError, match="policy version 1 arrived altered"):
        workers.rollout.update_weights(replace(weights, buffer=buffer))
    with pytest.raises(AssertionError, match="policy version 2 arrived altered"):
        workers.rollout.update_weights(replace(weights, policy_version=2))  # version 1 under another name
    assert workers.rollout.policy_version == 0
    assert workers.generate().policy_version.unique().tolist() == [0]
    assert torch.equal(torch.cat([p.flatten() for p in workers.rollout.policy.parameters()]), before)


def test_a_worker_says_what_it_has_done(world: Path) -> None:
    workers = Workers.build(ppo_config(world))
    rollout = workers.generate()
    used = workers.rollout.usage()
    assert used.tokens == int(rollout.response_mask.sum()) and used.seconds > 0
    assert workers.rollout.usage().tokens == 0
    workers.judge(rollout)
    for worker in (workers.reward, workers.reference, workers.learner):
        assert worker.usage().tokens == int(rollout.attention_mask.sum())
