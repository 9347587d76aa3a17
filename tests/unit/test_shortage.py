"""Memory that does not suffice: every role says what to change, or does the same again in smaller portions."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from worlds import Workers, chats_config, make_world, policy_weights, ppo_config, write_chats

from rlhf_ray import crews
from rlhf_ray.app import train_ppo
from rlhf_ray.cli import main
from rlhf_ray.config import PPOConfig, SFTConfig, load
from rlhf_ray.generation.native_engine import NativeEngine
from rlhf_ray.objectives import OBJECTIVES
from rlhf_ray.planning.needs import PHASES
from rlhf_ray.runtime.train_loop import TrainLoop
from rlhf_ray.runtime.train_step import World
from rlhf_ray.shortage import ADVICE, OutOfMemory, named

TOO_MUCH = 1 << 50
"""Bytes that no machine has."""
CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 5.79 GiB of which 1.62 GiB is free."
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shortage")
    make_world(folder)
    return folder


def run_out(*_: object) -> None:
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def card_runs_out() -> None:
    raise torch.OutOfMemoryError(CUDA)


@contextmanager
def room_for(tokens: int, *networks: Any) -> Iterator[None]:
    """Memory suffices for passes of so many tokens."""

    def enter(block: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if len(arguments[0]) > tokens:
            run_out()

    handles = [network.h[0].register_forward_pre_hook(enter) for network in networks]
    yield
    for handle in handles:
        handle.remove()


class SmallEngine(NativeEngine):
    """An engine whose cache has room for three rows."""

    def generate(self, *arguments: Any) -> Any:
        if self.max_rows > 3:
            np.empty(TOO_MUCH, dtype=np.uint8)
        return super().generate(*arguments)


def build(world: Path, **changes: Any) -> Workers:
    workers = Workers.build(ppo_config(world, **changes))
    engine = workers.rollout.engine
    small = SmallEngine(engine.model, eos_id=engine.eos_id, pad_id=engine.pad_id, max_rows=engine.max_rows)
    workers.rollout.engine = small
    return workers


# ---- what is said


@pytest.mark.parametrize(
    ("fail", "asked"),
    [
        (run_out, f"host memory, {TOO_MUCH:,} bytes"),
        (lambda: np.empty(TOO_MUCH, dtype=np.uint8), f"host memory, {TOO_MUCH:,} bytes"),
        (lambda: bytearray(TOO_MUCH), "host memory, an unknown number of bytes"),
        (card_runs_out, f"GPU memory, {5 * 2**29:,} bytes"),
    ],
)
def test_whoever_says_it_the_error_is_one(fail: Callable[[], object], asked: str) -> None:
    with pytest.raises(OutOfMemory) as raised, named("learner", "judge"), named("learner", "optimiser step"):
        fail()
    text = str(raised.value)
    assert text.startswith(f"learner, optimiser step: out of {asked} asked for") and "\n" not in text
    assert text.endswith("; take --memory.optimizer-bits 8 or --lora.rank 16")
    again = pickle.loads(pickle.dumps(raised.value))  # as it comes from another process
    assert type(again) is OutOfMemory and str(again) == text


def test_other_errors_stay_what_they_are_and_every_phase_of_every_role_has_advice() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), named("rollout", "generate"):
        raise RuntimeError("shapes differ")
    assert {phase for phases in ADVICE.values() for phase in phases} == {*PHASES, "optimiser step", "evaluate"}
    known = set(PPOConfig.model_fields) | set(SFTConfig.model_fields)
    for text in (text for phases in ADVICE.values() for text in phases.values()):
        flags = [word.removeprefix("--").replace("-", "_") for word in text.split() if word.startswith("--")]
        assert all(flag.partition(".")[0] in known for flag in flags), text


def test_every_role_names_itself_its_phase_and_what_to_change(world: Path) -> None:
    workers = build(world)
    model: Any = workers.learner.model
    with pytest.raises(OutOfMemory, match=r"rollout, generate: .*bytes asked for.*--generation\.max-rows \(5 now\)"):
        workers.generate()
    workers.rollout.engine.max_rows = workers.rollout.portion.size = 3
    rollout = workers.generate()
    experience = workers.experience()
    judge: Any = workers.reward.terms[0][-1]
    reference: Any = workers.reference
    lowered = r".*take a smaller --ppo\.micro-batch-size \(4 now\), or .*, or --auto-micro-batch, which halves it"
    with room_for(10, judge.model.trunk, reference.policy, model.critic.trunk):
        with pytest.raises(OutOfMemory, match="reward, judge" + lowered):
            workers.reward.score(rollout)
        with pytest.raises(OutOfMemory, match="reference, judge" + lowered):
            workers.reference.logprobs(rollout)
        with pytest.raises(OutOfMemory, match="learner, judge" + lowered):
            workers.learner.evaluate(rollout)
        with pytest.raises(OutOfMemory, match="learner, learn" + lowered):
            workers.learner.update(experience)
    hook = workers.learner.optimiser.register_step_pre_hook(run_out)
    with pytest.raises(OutOfMemory, match=r"learner, optimiser step: .*; take --memory\.optimizer-bits 8"):
        workers.learner.update(experience)
    hook.remove()


def test_a_run_ends_with_one_line_and_an_exit_code(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "greedy.py").write_text(f"def score(**row):\n    return len(bytearray({TOO_MUCH}))\n")
    config = ppo_config(world, reward=[f"{tmp_path / 'greedy.py'}:score"], run="greedy")
    assert main(PPOConfig, "", None, lambda _: train_ppo(config), []) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: reward, judge: out of host memory, an unknown number of bytes asked for")


# ---- the same again, in smaller portions


@pytest.mark.parametrize("sizes", [{"micro_batch_size": 4}, {"micro_batch_tokens": 150}])
def test_a_step_done_again_with_half_of_its_micro_batches_is_that_of_half_of_them(
    world: Path, sizes: dict[str, int]
) -> None:
    short, whole = (build(world, ppo=sizes, auto_micro_batch=auto) for auto in (True, False))
    whole.rollout.engine.max_rows = whole.rollout.portion.size = 3
    experience = whole.experience()
    first, second = experience.rollout.attention_mask.sum(1).sort(descending=True).values[:2].tolist()
    model: Any = short.learner.model
    with room_for(max(75, first + second), model.policy, model.critic.trunk):
        metrics = short.learner.update(experience)
    (setting, size), *_ = short.learner.usage().reduced.items()
    assert setting == f"ppo.{next(iter(sizes))}" and size < next(iter(sizes.values()))
    half = build(world, ppo={next(iter(sizes)): size})
    assert metrics == half.learner.update(experience)
    assert torch.equal(policy_weights(short), policy_weights(half))
    expected = whole.learner.update(experience)
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert whole.learner.usage().reduced == {}


def test_rows_and_opinions_are_the_same_in_smaller_portions_which_are_never_less_than_a_row(world: Path) -> None:
    short, whole = build(world, auto_micro_batch=True), Workers.build(ppo_config(world))
    rollout = whole.generate()
    again = short.generate()
    assert torch.equal(again.tokens, rollout.tokens) and torch.equal(again.rollout_logprobs, rollout.rollout_logprobs)
    assert short.rollout.usage().reduced == {"generation.max_rows": 2}
    model: Any = short.learner.model
    judge: Any = short.reward.terms[0][-1]
    reference: Any = short.reference
    longest = int(rollout.attention_mask.sum(1).max())
    with room_for(longest, judge.model.trunk, reference.policy, model.policy):
        found, expected = short.judge(rollout), whole.judge(rollout)
    assert reference.portion.size == short.reward.portion.size == short.learner.portion.size == 1
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.ref_logprobs, expected.ref_logprobs, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(found.evaluation.values, expected.evaluation.values, atol=1e-6, rtol=1e-6)
    with room_for(longest - 1, reference.policy), pytest.raises(OutOfMemory) as raised:
        reference.logprobs(rollout)
    assert "micro-batch" not in str(raised.value)  # there is nothing left to halve


def test_a_run_says_what_it_has_halved_and_keeps_it(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = crews.build_policy_critic

    def small(*arguments: Any, **options: Any) -> Any:
        model: Any = real(*arguments, **options)
        room_for(100, model.policy).__enter__()
        return model

    monkeypatch.setattr(crews, "build_policy_critic", small)
    folder = train_ppo(ppo_config(world, run="short", total_steps=2, auto_micro_batch=True))
    log = (folder / "log.txt").read_text()
    assert log.count("learner: memory did not suffice; done again with ppo.micro_batch_size 2, which it stays at") == 1
    assert json.loads((folder / "memory.json").read_text())["reduced"] == {"learner": {"ppo.micro_batch_size": 2}}
    assert "auto_micro_batch" not in (folder / "config.yaml").read_text()


def test_a_training_stage_does_the_same(world: Path) -> None:
    write_chats(world, 40)

    def loop(**changes: Any) -> TrainLoop:
        config = chats_config(world, cache=None, micro_batch_size=6, **changes)
        made = TrainLoop(OBJECTIVES["sft"](config), config, World())
        made.start(None)
        return made

    short, stuck, half = loop(auto_micro_batch=True), loop(), loop(micro_batch_tokens=1)
    model: Any = short.model
    most = max(row.length for row in short.data.train)
    with room_for(most, model, stuck.model):
        short.train_step(lambda: False)
        with pytest.raises(OutOfMemory, match=r"sft, learn: .*--micro-batch-size \(6 now\)"):
            stuck.train_step(lambda: False)
        facts = short.evaluate()
    assert short.portion.reduced == {"micro_batch_size": 1}
    half.train_step(lambda: False)
    for ours, theirs in zip(short.model.parameters(), half.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert facts == half.evaluate()


def test_the_short_flag_is_the_same_for_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    taken: list[PPOConfig] = []
    assert main(PPOConfig, "", None, taken.append, ["--micro-batch-tokens", "512", "--auto-micro-batch"]) == 0
    assert taken[0].ppo.micro_batch_tokens == 512 and taken[0].auto_micro_batch
    assert load(SFTConfig, ["--micro-batch-tokens", "512"]).micro_batch_tokens == 512
    with pytest.raises(ValueError, match="auto_micro_batch and sharding = fsdp2 exclude each other"):
        load(PPOConfig, ["--num-learners", "2", "--sharding", "fsdp2", "--auto-micro-batch"])
