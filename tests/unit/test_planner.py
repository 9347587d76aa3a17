"""The memory planner: bytes counted by hand, what grows with what, choices that fit and what refusals say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import Workers, make_world, ppo_config

from rlhf_ray.config import ConfigError, PPOConfig, load
from rlhf_ray.config.amounts import in_bytes
from rlhf_ray.config.presets import preset_file
from rlhf_ray.fitting import limits
from rlhf_ray.models import GPT2, GPT2Config, preset
from rlhf_ray.models.layout import Layout
from rlhf_ray.models.quantised import freeze
from rlhf_ray.ops.logprobs import before
from rlhf_ray.planning import sizes, table
from rlhf_ray.planning.choose import Run, changed, plan, value_of
from rlhf_ray.planning.command import CARDS, SHAPES, show_presets
from rlhf_ray.planning.needs import BASE, MIB, PHASES, Need, Prediction
from rlhf_ray.planning.predict import predict
from rlhf_ray.planning.roles import Models
from rlhf_ray.planning.shapes import models_of

SMALL = GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2)
NUMBERS = 100 * 32 + 64 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
MODELS = Models(policy=SMALL, rewards=(SMALL,), critic=SMALL)
MEDIUM = Models(policy=preset("medium", 50264), rewards=(preset("medium", 50264),), critic=preset("medium", 50264))


def config(**changes: Any) -> PPOConfig:
    base: dict[str, Any] = {
        "batch_size": 8,
        "generation.prompt_length": 24,
        "generation.response_length": 8,
        "generation.shard_size": 4,
        "ppo.mini_batch_size": 8,
        "ppo.micro_batch_size": 4,
    }
    return changed(PPOConfig(), {**base, **changes})


def role(prediction: Prediction, name: str) -> Need:
    return next(need for need in prediction.needs if need.role == name)


# ---- sizes


def test_weights_are_counted_as_the_model_has_them() -> None:
    model = GPT2(SMALL)
    assert sizes.parameters(SMALL) == sum(p.numel() for p in model.parameters()) == NUMBERS
    assert sizes.stored(SMALL, "float32") == 4 * NUMBERS
    for kind in ("bfloat16", "int8", "int4"):
        model = GPT2(SMALL)
        freeze(model, kind, "cpu")
        assert sizes.stored(SMALL, kind) == sum(x.nbytes for x in (*model.parameters(), *model.buffers())), kind


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_forward_pass_keeps_is_what_autograd_saves(checkpointing: bool) -> None:
    model, rows = GPT2(SMALL), torch.randint(100, (3, 32))
    model.checkpointing = checkpointing
    response = (torch.arange(32) >= 24).expand(3, 32)
    held: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    alive = []  # so that no address is given twice
    with torch.autograd.graph.saved_tensors_hooks(lambda x: alive.append(x) or keep(x), lambda x: x):
        states = model.states(rows, Layout.of(torch.ones_like(rows), read=before(response)))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = sum(size for address, size in held.items() if address not in weights)
    batch = sizes.Batch(rows=3, prompt=24, response=8)
    states_of_head = states.nbytes
    passing = batch.tokens * 32 * (2 + 8) * 4  # gradients on their way through one block, which come later
    again = batch.tokens * sum(sizes._block(SMALL, 4)) if checkpointing else 0
    expected = sizes.kept(SMALL, batch, number=4, checkpointing=checkpointing) - passing - again - states_of_head
    assert found == pytest.approx(expected, rel=0.1)  # tokens and positions are not counted


def test_logits_exist_a_chunk_at_a_time() -> None:
    shape = preset("mini_xl", 50264)
    forward, backward = sizes.head(shape, 16, number=4, device="cpu", entropy=False, learns="weight")
    logits, states, table_of_weight = 4 * 16 * 50264, 4 * 16 * 384, 4 * 50264 * 384
    assert forward == states + logits
    assert backward == states + logits + table_of_weight + states
    many, _ = sizes.head(shape, 16 * 512, number=4, device="cpu", entropy=True)
    assert many < 4 * 16 * 512 * 50264 / 10


# ---- roles


def test_bytes_of_every_role_by_hand() -> None:
    prediction = predict(config(**{"memory.activation_checkpointing": False}), MODELS, "cuda")
    assert [need.role for need in prediction.needs] == ["rollout", "reward", "reference", "learner"]
    assert [need.processes for need in prediction.needs] == [2, 1, 1, 1]
    assert all(need.base == BASE["cuda"][need.role] * MIB for need in prediction.needs)
    rollout, learner = role(prediction, "rollout"), role(prediction, "learner")
    assert rollout.held == {"weights": 4 * NUMBERS, "cache": 2 * 2 * 16 * 32 * 32 * 4}  # rows in whole blocks of 16
    assert role(prediction, "reward").held == role(prediction, "reference").held == {"weights": 4 * NUMBERS}
    trained = 2 * NUMBERS + 33
    assert learner.held == {"weights": 4 * trained, "moments": 8 * trained}
    assert learner.passing["learn"]["gradients"] == 4 * trained
    assert prediction.total == sum(need.processes * need.peak for need in prediction.needs)


def test_adapters_take_the_place_of_gradients_and_of_the_reference() -> None:
    lora = {"lora.rank": 4, "memory.frozen": "int8", "ppo.critic": "shared"}
    prediction = predict(config(**lora), MODELS, "cuda")
    learner = role(prediction, "learner")
    adapters = 2 * 4 * (4 + 2 + 5 + 5) * 32
    assert "reference" not in [need.role for need in prediction.needs]
    assert learner.held["weights"] == sizes.stored(SMALL, "int8") + 4 * (adapters + 33)
    assert learner.held["moments"] == 8 * (adapters + 33)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_shared_base_is_counted_once(device: Any) -> None:
    models = replace(MODELS, over=(True,), critic_over=True)
    lora = {"lora.rank": 4, "memory.frozen": "int8"}
    one, copies = (predict(config(**lora, **{"memory.share_base": x}), models, device) for x in (True, False))
    others = {"rollout": 2, "reward": 1, "learner": 1}  # on a host it is nobody's, on a card the learner's
    assert copies.total - one.total == (sum(others.values()) - 1) * sizes.stored(SMALL, "int8")
    assert ("base" in [need.role for need in one.needs]) == (device == "cpu")


def test_prediction_beside_real_workers(tmp_path: Path) -> None:
    make_world(tmp_path)
    asked = ppo_config(tmp_path, generation={"engine": "native"})
    workers = Workers.build(asked)
    workers.learner.update(workers.experience())
    model, optimiser = workers.learner.model, workers.learner.optimiser
    learner = role(predict(asked, models_of(asked), "cuda"), "learner")
    weights = sum(p.nbytes for net in (model.policy, model.critic) for p in net.parameters())  # type: ignore[attr-defined]
    moments = sum(x.nbytes for state in optimiser.state.values() for x in state.values() if x.numel() > 1)
    assert learner.held["weights"] == weights
    assert learner.held["moments"] == pytest.approx(moments, abs=64)
    rollout = role(predict(asked, models_of(asked), "cpu"), "rollout")
    native = workers.rollout.engine._native  # type: ignore[attr-defined]
    assert rollout.held["cache"] == pytest.approx(native.keys.nbytes + native.values.nbytes, rel=0.35)
    packed = sum(x.nbytes for x in native._packed.values())  # in whole panels of columns, which matters for so few
    assert rollout.held["packed"] == pytest.approx(packed, rel=0.2)


# ---- what grows with what


GROWING: Sequence[dict[str, Any]] = (
    {"generation.prompt_length": 512},
    {"generation.response_length": 512},
    {"generation.shard_size": 64, "batch_size": 64},
    {"ppo.micro_batch_size": 8},
    {"max_staleness": 1, "weight_sync": "direct"},
    {"num_rollout_workers": 3},
)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_work_never_needs_less(device: Any) -> None:
    least = predict(config(), MODELS, device).total
    assert least == predict(config(weight_sync="store"), MODELS, device).total  # which is what auto takes
    for change in GROWING:
        assert predict(config(**change), MODELS, device).total > least, change
    larger = Models(policy=preset("small", 50264), rewards=MODELS.rewards, critic=MODELS.critic)
    assert predict(config(), larger, device).total > least


def test_savers_save() -> None:
    long = config(**{"generation.prompt_length": 512})
    whole = predict(long, MEDIUM, "cuda").total
    for saver in (
        {"memory.activation_checkpointing": True},
        {"memory.optimizer_bits": 8},
        {"memory.frozen": "int8"},
        {"memory.sleep": True},
        {"ppo.critic": "shared"},
        {"generation.dtype": "bfloat16"},
        {"lora.rank": 16},
        {"num_rollout_workers": 0},
    ):
        assert predict(changed(long, saver), MEDIUM, "cuda").total < whole, saver


def test_one_process_takes_the_largest_base_once() -> None:
    prediction = predict(config(num_rollout_workers=0), MODELS, "cpu")
    assert prediction.together and "ray" not in [need.role for need in prediction.needs]
    bases = [need.base for need in prediction.needs]
    assert max(bases) < prediction.total < sum(bases)


# ---- choices


def test_nothing_is_changed_where_it_fits() -> None:
    asked = config()
    found = plan(Run(config=asked, models=MODELS, device="cuda", budget=10**12), what="and there is plenty")
    assert found.chosen == {} and found.config == asked
    assert "nothing had to be changed" in table.summary(found, asked)


def test_what_is_chosen_fits_and_leaves_results_alone() -> None:
    asked = config(**{"generation.response_length": 400, "generation.prompt_length": 400, "generation.shard_size": 64})
    neutral = {"ppo.micro_batch_size", "generation.max_rows", "memory.activation_checkpointing"}
    neutral |= {"memory.sleep", "memory.offload_optimizer", "weight_sync"}
    whole = predict(asked, MEDIUM, "cuda").total
    run = Run(config=asked, models=MEDIUM, device="cuda", budget=whole)
    least = run.smallest().total
    assert least < whole
    for budget in range(whole, least, -(whole - least) // 4):
        found = plan(Run(config=asked, models=MEDIUM, device="cuda", budget=budget), what="")
        assert found.prediction.total <= budget
        assert found.prediction == predict(found.config, MEDIUM, "cuda")
        assert set(found.chosen) <= neutral
        assert (found.chosen == {}) == (budget == whole)
        assert changed(found.config, {name: value_of(asked, name) for name in found.chosen}) == asked


def test_a_refusal_is_one_sentence_that_says_what_would_fit() -> None:
    run = Run(config=config(), models=MEDIUM, device="cuda", budget=6 * 10**9)
    with pytest.raises(ValueError, match=r"--lora\.rank 16") as refused:
        plan(run, what="and gpu_memory is 6GB")
    text = str(refused.value)
    assert "and gpu_memory is 6GB" in text and "\n" not in text
    assert "the model small fits in " in text or "the model mini_xl fits in " in text
    with pytest.raises(ValueError, match="no shipped model fits either"):
        plan(Run(config=config(), models=MEDIUM, device="cuda", budget=10**8), what="and there is nothing")


def test_rows_at_once_and_micro_batches_leave_rows_and_gradients_alone(tmp_path: Path) -> None:
    make_world(tmp_path)
    whole = Workers.build(ppo_config(tmp_path))
    fewer = Workers.build(ppo_config(tmp_path, generation={"max_rows": 2}, ppo={"micro_batch_size": 1}))
    assert torch.equal(whole.generate().tokens, fewer.generate().tokens)
    losses = [workers.learner.update(workers.experience())["loss/policy_avg"] for workers in (whole, fewer)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-7)


def test_limits_share_the_budget_out() -> None:
    asked = config()
    found = plan(Run(config=asked, models=MODELS, device="cuda", budget=10**10), what="")
    needs = found.prediction.needs
    shared_out = sum(need.processes * (limits(found)[need.role] + need.base) for need in needs)
    assert shared_out == pytest.approx(found.budget, rel=1e-6)
    assert all(limits(found)[need.role] >= need.peak - need.base for need in needs)
    assert limits(plan(Run(config=asked, models=MODELS, device="cpu", budget=10**11), what="")) == {}


# ---- presets and amounts


@pytest.mark.parametrize("name", SHAPES)
def test_every_preset_fits_the_card_of_its_name(name: str) -> None:
    asked = load(PPOConfig, ["--config", str(preset_file("ppo", name))])
    generation = asked.generation
    assert (asked.num_rollout_workers, generation.prompt_length, generation.response_length) == (2, 256, 256)
    assert generation.dtype == "bfloat16" and asked.memory.frozen != "float32"
    card = int(name.rpartition("_")[2].removesuffix("gb"))
    models = models_of(asked, named=SHAPES[name])
    assert name == "mini_xl_6gb" or models == models_of(asked)  # its folders are the default ones
    found = plan(Run(config=asked, models=models, device="cuda", budget=card * 10**9), what="")
    assert found.chosen == {}


def test_the_table_of_presets_is_the_one_in_the_docs(capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    show_presets()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(SHAPES) and all(line.count("|") == len(CARDS) + 2 for line in lines)
    assert all(" no" not in line.split("|")[-2] for line in lines[2:])  # 24 GB are enough for every preset
    assert "\n".join(lines) in (repository / "docs" / "MEMORY.md").read_text(encoding="utf-8")


def test_rows_of_the_table_are_the_prediction() -> None:
    prediction = predict(config(), MODELS, "cuda")
    *roles, together = table.rows(prediction)
    assert [len(row) for row in (*roles, together)] == [len(table.COLUMNS)] * 5
    assert together[-1] == round(prediction.total / 1e9, 2)
    assert [row[2 + PHASES.index("learn")] for row in roles] == [
        round(need.at("learn") / 1e9, 2) for need in prediction.needs
    ]


def test_a_folder_that_is_not_there_goes_by_its_name() -> None:
    assert models_of(config(policy=Path("some/gpt2-xl"))).policy == preset("xl", 50264)
    with pytest.raises(ValueError, match=r"policy = some/thing: .* --preset"):
        models_of(config(policy=Path("some/thing")))


def test_amounts() -> None:
    assert [in_bytes(text) for text in ("6GB", "5.5 GiB", "800MB")] == [6 * 10**9, 5905580032, 8 * 10**8]
    with pytest.raises(ConfigError, match="gpu_memory = 'much': give a number"):
        load(PPOConfig, ["--gpu-memory", "much"])
