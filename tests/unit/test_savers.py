"""What saves memory while learning changes nothing, or no more than it says: checkpointing, 8-bit moments, sleep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import Workers, make_world, policy_weights, ppo_config

from rlhf_ray.algorithms.ppo import check_first_kl, first_kl_tolerance
from rlhf_ray.app import train_ppo
from rlhf_ray.config import Memory, PPOConfig, SFTConfig, load
from rlhf_ray.models import GPT2, GPT2Config
from rlhf_ray.rundir.fit import check_optimiser
from rlhf_ray.rundir.tree import load_tree, save_tree
from rlhf_ray.workers.optimiser import BLOCK, adamw, decode, encode


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("savers")
    make_world(folder)
    return folder


def test_checkpointing_changes_no_bit_of_an_update(world: Path) -> None:
    learned = []
    for checkpointing in (False, True):
        memory = {"activation_checkpointing": checkpointing}
        workers = Workers.build(ppo_config(world, memory=memory))
        assert workers.learner.model.policy.checkpointing == checkpointing
        learned.append((workers.learner.update(workers.experience()), policy_weights(workers)))
    assert learned[0][0] == learned[1][0]
    assert torch.equal(learned[0][1], learned[1][1])


def test_what_dropout_drops_is_dropped_again_when_a_block_is_recomputed() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = GPT2(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4, dropout=0.5)).train()
        model.checkpointing = checkpointing
        model(torch.arange(20)[None]).square().sum().backward()
        gradients.append(model.h[0].mlp.c_fc.weight.grad)
    assert gradients[0] is not None and gradients[1] is not None
    assert gradients[0].abs().max() > 0 and torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("signed", [True, False])
def test_moments_come_back_within_a_few_percent_down_to_a_millionth_of_the_largest(signed: bool) -> None:
    x = torch.logspace(-6, 0, 3 * BLOCK + 10).flip(0)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))] * (1 if not signed else -1)
    codes, scales = encode(x, signed=signed)
    assert codes.element_size() == 1 and len(scales) == 4
    error = (decode(codes, scales) / x - 1).abs()
    assert error.median() < 0.1 and error[x.abs() > 0.1].max() < 0.03 and error.max() < 0.7
    again = encode(decode(codes, scales), signed=signed)
    assert torch.equal(again[0], codes)  # what is read and written back stays
    nothing = decode(*encode(torch.zeros(300), signed=signed))
    assert torch.equal(nothing, torch.zeros(300))


def descend(optimiser: torch.optim.Optimizer, weights: list[torch.Tensor], steps: range) -> float:
    """Steps of a regression whose gradients differ a thousandfold in size; its last loss."""
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(32, 80, generator=draw) * torch.logspace(-1.5, 1.5, 80)
        target = torch.sin(x @ torch.linspace(-1, 1, 80 * 64).view(80, 64) / 80).to(weights[0].device)
        x = x.to(weights[0].device)
        loss = (torch.tanh(x @ weights[0]) @ weights[1] + weights[2] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return loss.item()


def problem(bits: int, device: str = "cpu", **kept: Any) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    torch.manual_seed(0)
    shapes = (80, 70), (70, 64), (64,)
    weights: list[torch.Tensor] = [torch.nn.Parameter(0.02 * torch.randn(shape).to(device)) for shape in shapes]
    groups = [{"params": weights, "weight_decay": 0.0}]
    return adamw(groups, bits=bits, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, **kept), weights


def test_eight_bits_descend_as_thirty_two_do_and_hold_a_quarter() -> None:
    (whole, theirs), (short, ours) = problem(32), problem(8)
    losses = [descend(optimiser, weights, range(60)) for optimiser, weights in ((whole, theirs), (short, ours))]
    assert losses[0] < 0.3 and losses[1] == pytest.approx(losses[0], rel=0.05)
    held = [
        sum(x.nbytes for x in optimiser.state[weights[0]].values() if isinstance(x, torch.Tensor))
        for optimiser, weights in ((whole, theirs), (short, ours))
    ]
    assert held[1] < 0.26 * held[0]
    assert short.state[ours[2]]["exp_avg"].dtype == torch.float32  # too small to be worth it


def test_eight_bits_resume_bit_for_bit_and_other_bits_are_refused(tmp_path: Path) -> None:
    through, weights = problem(8)
    descend(through, weights, range(5))
    save_tree(tmp_path / "optimiser", through.state_dict())
    resumed, others = problem(8)
    for weight, other in zip(weights, others, strict=True):
        other.data.copy_(weight.data)
    state = load_tree(tmp_path / "optimiser")
    check_optimiser(resumed, state, tmp_path)
    resumed.load_state_dict(state)
    assert descend(through, weights, range(5, 10)) == descend(resumed, others, range(5, 10))
    assert all(torch.equal(weight, other) for weight, other in zip(weights, others, strict=True))
    with pytest.raises(ValueError, match=r"its moments have 8 bits, this run's 32: take memory\.optimizer_bits 8"):
        check_optimiser(problem(32)[0], state, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [32, 8])
def test_moments_that_wait_in_host_memory_change_nothing(bits: int) -> None:
    (here, weights), (away, others) = problem(bits, "cuda"), problem(bits, "cuda", offload=True)
    assert descend(here, weights, range(5)) == descend(away, others, range(5))
    assert all(torch.equal(weight, other) for weight, other in zip(weights, others, strict=True))
    moment = away.state[others[0]]["exp_avg"]
    assert moment.device.type == "cpu" and torch.equal(moment, here.state[weights[0]]["exp_avg"].cpu())


def test_a_learner_with_eight_bits_goes_on_from_its_checkpoint_bit_for_bit(world: Path, tmp_path: Path) -> None:
    config = ppo_config(world, memory={"optimizer_bits": 8, "activation_checkpointing": True})
    through, resumed = Workers.build(config), Workers.build(config)
    experience = through.experience()
    through.learner.update(experience)
    through.learner.snapshot()
    through.learner.write(tmp_path)
    resumed.learner.load(tmp_path)
    again = replace(experience, old_logprobs=through.learner.evaluate(experience.rollout).old_logprobs)
    assert through.learner.update(again) == resumed.learner.update(again)
    assert torch.equal(policy_weights(through), policy_weights(resumed))


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_generator_that_has_slept_says_the_same(world: Path, engine: str) -> None:
    workers = Workers.build(ppo_config(world, generation={"engine": engine}))
    first = workers.generate()
    for worker in (workers.rollout, workers.reward, workers.reference, workers.learner):
        worker.sleep()
    held = vars(workers.rollout.engine._native if engine == "native" else workers.rollout.engine)
    assert not held["_packed"] and not held["keys"].numel() if engine == "native" else held["_slots"] is None
    assert torch.equal(workers.generate().rollout_logprobs, first.rollout_logprobs)


def test_the_kl_is_measured_from_the_reference_as_it_is_kept(world: Path) -> None:
    found = {}
    for kind in ("float32", "bfloat16", "int8", "int4"):
        config = ppo_config(world, memory={"frozen": kind})
        workers = Workers.build(config)
        judged = workers.judge(workers.generate())
        check_first_kl(judged, first_kl_tolerance(config))
        found[kind] = float((judged.evaluation.old_logprobs - judged.ref_logprobs).abs().max())
    assert found.pop("float32") < 1e-5 < min(found.values()) < max(found.values()) < 1.0
    adapted = ppo_config(world, memory={"frozen": "int8"}, lora={"rank": 2})
    assert first_kl_tolerance(adapted) == first_kl_tolerance(ppo_config(world))


def test_a_resumed_run_may_compute_otherwise_and_not_something_else(world: Path) -> None:
    folder = train_ppo(ppo_config(world, total_steps=1, memory={"sleep": True, "activation_checkpointing": True}))
    train_ppo(ppo_config(world, total_steps=1, memory={"offload_optimizer": True}))  # complete already, and the same
    assert "sleep" not in (folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"memory\.frozen: 'float32' -> 'int8'"):
        train_ppo(ppo_config(world, total_steps=1, memory={"frozen": "int8"}))


def test_savers_that_do_nothing_or_do_not_fit_are_refused(world: Path) -> None:
    with pytest.raises(ValueError, match=r"memory\.sleep = True is for PPO"):
        SFTConfig(memory=Memory(sleep=True))
    with pytest.raises(ValueError, match=r"sharding = fsdp2 shares out moments of 32 bits"):
        ppo_config(world, num_rollout_workers=1, num_learners=2, sharding="fsdp2", memory={"optimizer_bits": 8})
    assert load(PPOConfig, ["--memory.optimizer-bits", "8", "--memory.frozen", "int8"]).memory.optimizer_bits == 8
