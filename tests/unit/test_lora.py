"""Adapters: what they compute, what learns, what a checkpoint keeps, what travels, and PEFT's folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_folders import make_policy, small_model
from small_models import CONFIG, random_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
from worlds import Workers, chats_config, make_world, ppo_config, write_chats

from rlhf_ray import app
from rlhf_ray.algorithms.ppo import credit
from rlhf_ray.checkpoint import CheckpointError
from rlhf_ray.config import GrowConfig, LoRA, RewardModelConfig
from rlhf_ray.models import GPT2
from rlhf_ray.models.adapter_folders import Base, load_adapter, read_lora, save_adapter
from rlhf_ray.models.grow import grow
from rlhf_ray.models.hf_weights import load_policy, load_reward_model, save_policy
from rlhf_ray.models.layout import Layout
from rlhf_ray.models.lora import adapted_layers, merged, with_adapters
from rlhf_ray.objectives import OBJECTIVES
from rlhf_ray.ops.logprobs import before, token_logprobs
from rlhf_ray.run import read_metrics
from rlhf_ray.runtime.train_loop import TrainLoop
from rlhf_ray.runtime.train_step import World

LORA = LoRA(rank=4, alpha=8.0)
TOKENS = torch.randint(0, CONFIG.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))
RANK_4 = {"rank": 4, "alpha": 8.0}


def stir_adapters(model: nn.Module) -> nn.Module:
    """Have the adapters learn something."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.B.copy_(0.1 * torch.randn(layer.B.shape, generator=generator))
    return model.eval()


def logprobs_of(model: GPT2, tokens: Tensor = TOKENS) -> Tensor:
    return model.logits(model(tokens)).log_softmax(-1)


# -- the model


@torch.no_grad()
def test_new_adapters_change_no_bit_and_follow_from_the_seed() -> None:
    base = random_model().eval()
    model, again, other = (with_adapters(base, LORA, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(model(TOKENS), base(TOKENS))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(adapted_layers(model))[1].A, next(adapted_layers(other))[1].A)
    frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    assert frozen == {p.data_ptr() for p in base.parameters()}  # one copy, which the base still is


@pytest.mark.parametrize("targets", [LORA.targets, ["attention_in"]])
@torch.no_grad()
def test_merged_weights_say_what_adapters_say(targets: list[Any]) -> None:
    base = random_model().eval()
    model = stir_adapters(with_adapters(base, LoRA(rank=4, alpha=8.0, targets=targets), seed=0))
    assert len(list(adapted_layers(model))) == 2 * len(targets)
    plain = merged(model)
    found, expected = (network.logits(network(TOKENS)) for network in (plain, model))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()  # merging in float64 gives no less
    assert (logprobs_of(base) - logprobs_of(model)).abs().max() > 0.1
    name, layer = next(adapted_layers(model))
    torch.testing.assert_close(plain.get_parameter(f"{name}.weight"), layer.base.weight + 2.0 * layer.B @ layer.A)


class Made(TorchDispatchMode):
    """Shapes of all that is computed meanwhile, but for views of given tensors."""

    def __init__(self, but: list[Tensor]) -> None:
        super().__init__()
        self.but, self.shapes = {x.untyped_storage().data_ptr() for x in but}, set[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.shapes |= {tuple(x.shape) for x in made if x.untyped_storage().data_ptr() not in self.but}
        return out


def test_no_gradient_is_formed_for_weights_that_are_frozen() -> None:
    mask = torch.ones(TOKENS.shape, dtype=torch.bool)
    shapes = {(97, 32), (96, 32), (32, 32), (128, 32), (32, 128)}  # the tied head and a block's four layers
    full, adapted = random_model(), with_adapters(random_model(), LORA, seed=0)
    for model in (full, adapted):
        states = model.states(TOKENS, Layout.of(mask, read=before(mask)))
        logprobs, _ = token_logprobs(states, model.wte.weight, TOKENS, mask)
        with Made(but=list(model.parameters())) as made:
            logprobs.sum().backward()
        assert made.shapes & shapes == (shapes if model is full else set())
    learned = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert len(learned) == 16 and all(name.endswith((".A", ".B")) for name in learned)


# -- PEFT


@torch.no_grad()
def test_peft_opens_what_we_write_and_we_what_peft_writes(tmp_path: Path) -> None:
    make_policy(tmp_path / "policy")
    base = load_policy(tmp_path / "policy").eval()
    tokens = TOKENS % base.config.vocab_size
    model = stir_adapters(with_adapters(base, LORA, seed=0))
    save_adapter(model, tmp_path / "ours", LORA, Base.of(tmp_path / "policy"))
    theirs = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "policy"), tmp_path / "ours")
    expected = theirs(tokens).logits
    torch.testing.assert_close(model.logits(model(tokens)), expected, atol=2e-5, rtol=1e-5)
    assert (base.logits(base(tokens)) - expected).abs().max() > 0.01

    config = LoraConfig(r=2, lora_alpha=3, target_modules=["attn.c_attn", "mlp.c_proj"], init_lora_weights=False)
    made = get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "policy"), config)
    made.save_pretrained(tmp_path / "theirs")
    lora = read_lora(tmp_path / "theirs")
    assert lora == LoRA(rank=2, alpha=3.0, targets=["attention_in", "mlp_out"])
    ours = with_adapters(base, lora, seed=0)
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours.logits(ours(tokens)), made.eval()(tokens).logits, atol=2e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match=r"theirs: the adapter does not fit this model: alpha / rank is 1\.5"):
        load_adapter(model, tmp_path / "theirs")
    get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "policy"), LoraConfig(use_dora=True)).save_pretrained(
        tmp_path / "dora"
    )
    with pytest.raises(ValueError, match="use_dora is True; only False can be read"):
        read_lora(tmp_path / "dora")


# -- SFT and the reward model


def make_loop(name: str, folder: Path, at: Path | None) -> TrainLoop:
    common: dict[str, Any] = {"lora": RANK_4, "epochs": 4.0, "batch_size": 6}
    if name == "sft":
        config: Any = chats_config(folder, dropout=0.1, **common)
    else:
        config = RewardModelConfig(
            data=[folder / "pairs.jsonl"], policy=folder / "policy", cache=None, max_length=64, device="cpu", **common
        )
    loop = TrainLoop(OBJECTIVES[name](config), config, World())
    loop.start(at)
    return loop


def steps(loop: TrainLoop, count: int, folder: Path) -> Path:
    """Take steps, and write a checkpoint."""
    for _ in range(count):
        loop.train_step(lambda: False)
    snapshot = loop.snapshot(inputs="")
    loop.objective.save(snapshot.model, folder)
    snapshot.write(folder)
    return folder


@pytest.mark.parametrize("name", ["sft", "reward_model"])
def test_training_changes_the_adapters_alone_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    make_policy(tmp_path / "policy")
    write_chats(tmp_path, 40)
    rows = [{"prompt": f"Where is {i}?", "chosen": f"In {i * i}.", "rejected": "No."} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loop = make_loop(name, tmp_path, None)
    before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    half = steps(loop, 2, tmp_path / "half")
    whole = steps(loop, 2, tmp_path / "whole")
    for parameter, p in loop.model.named_parameters():
        learns = parameter.endswith((".A", ".B", "score.weight"))
        assert torch.equal(p, before[parameter]) != learns and p.requires_grad == learns, parameter
    again = steps(make_loop(name, tmp_path, half), 2, tmp_path / "again")
    for file in ("model.safetensors", "adapter/adapter_model.safetensors", "trainer/optimiser.safetensors"):
        assert (again / file).read_bytes() == (whole / file).read_bytes(), file

    tokens = TOKENS % 287
    theirs = {"sft": GPT2LMHeadModel, "reward_model": GPT2ForSequenceClassification}[name]
    base = theirs.from_pretrained(tmp_path / "policy", num_labels=1)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, whole / "adapter").eval()(tokens).logits
        if name == "sft":
            opened = load_policy(whole).eval()
            found = opened.logits(opened(tokens))
        else:
            found = loop.model(tokens, torch.ones_like(tokens))[:, None]
            assert load_reward_model(whole)(tokens, torch.ones_like(tokens)).shape == (3,)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    make_policy(tmp_path / "policy", seed=1)
    with pytest.raises(CheckpointError, match=r"the policy's adapter belongs to the weights that .* holds others"):
        make_loop(name, tmp_path, half)


def test_a_policy_whose_embedding_would_have_to_grow_is_refused_and_one_that_has_grown_is_not(tmp_path: Path) -> None:
    make_policy(tmp_path / "policy")
    small = small_model(270)
    save_policy(small, tmp_path / "policy", pad_id=0, bos_id=0, eos_id=0)
    with pytest.raises(ValueError, match=r"lora\.rank = 4: the embedding .* has 270 rows, the vocabulary 287 tokens"):
        OBJECTIVES["sft"](chats_config(tmp_path, lora=RANK_4))
    grown = load_policy(grow(GrowConfig(policy=tmp_path / "policy", output=tmp_path / "grown")))
    OBJECTIVES["sft"](chats_config(tmp_path, lora=RANK_4, policy=tmp_path / "grown"))
    rows = grown.wte.weight.detach()
    assert torch.equal(rows[:270], small.wte.weight) and len(rows[270:].unique(dim=0)) == 17
    assert 0.5 < float(rows[270:].std() / rows[:270].std()) < 2.0
    with pytest.raises(ValueError, match="a row for every special token already"):
        grow(GrowConfig(policy=tmp_path / "grown", output=tmp_path / "again"))


# -- PPO


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    make_world(folder)
    return folder


@pytest.mark.parametrize(
    ("critic", "engine", "frozen"),
    [("separate", "native", "float32"), ("shared", "torch", "float32"), ("separate", "torch", "int8")],
)
def test_ppo_learns_and_publishes_adapters(world: Path, tmp_path: Path, critic: str, engine: str, frozen: str) -> None:
    config = ppo_config(
        world, lora=RANK_4, ppo={"critic": critic}, generation={"engine": engine}, memory={"frozen": frozen}
    )
    workers = Workers.build(config)
    model: Any = workers.learner.model
    judged = workers.judge(workers.generate())
    assert torch.equal(judged.ref_logprobs, judged.evaluation.old_logprobs)  # the first KL is 0
    parts = [model.policy, model.critic if critic == "separate" else model.head]
    before = [{name: x.clone() for name, x in part.state_dict().items()} for part in parts]
    workers.learner.update(credit(config.ppo, judged, 0.05)[0])
    for part, state in zip(parts, before, strict=True):
        changed = {name for name, x in part.state_dict().items() if not torch.equal(x, state[name])}
        assert changed == {name for name, p in part.named_parameters() if p.requires_grad}
        assert all(".A" in n or ".B" in n or "score" in n or n in ("weight", "bias") for n in changed)

    weights = workers.learner.weights(1)
    assert weights is not None and weights.buffer.nbytes == 4 * 2 * 4 * (128 + 64 + 160 + 160)
    workers.rollout.update_weights(weights)
    rollout = workers.generate()
    evaluation = workers.learner.evaluate(rollout)
    torch.testing.assert_close(rollout.rollout_logprobs, evaluation.old_logprobs, atol=1e-4, rtol=0)
    assert (workers.reference.logprobs(rollout) - evaluation.old_logprobs).abs().max() > 1e-3

    workers.learner.snapshot()
    workers.learner.write(tmp_path)
    again = Workers.build(config)
    again.learner.load(tmp_path)
    assert torch.equal(again.learner.evaluate(rollout).old_logprobs, evaluation.old_logprobs)
    found = again.learner.evaluate(rollout).values
    assert found is not None and evaluation.values is not None and torch.equal(found, evaluation.values)
    opened = load_policy(tmp_path).eval()
    torch.testing.assert_close(logprobs_of(opened), logprobs_of(model.policy), atol=1e-5, rtol=1e-5)


def test_a_ppo_run_begins_with_no_kl_and_resumes_bit_for_bit(world: Path) -> None:
    config = ppo_config(world, run="whole", lora=RANK_4, keep=9)
    app.train_ppo(config)
    folder = app.run_folder(config)
    rows = read_metrics(folder)
    assert rows[0]["objective/kl"] == 0.0 and rows[1]["objective/kl"] != 0.0
    files = {file: file.read_bytes() for file in (folder / "step_000003").rglob("*.safetensors")}
    assert len(files) == 6
    for step in (2, 3):
        shutil.rmtree(folder / f"step_00000{step}")
    app.train_ppo(config)
    log = (folder / "log.txt").read_text(encoding="utf-8")
    assert "going on from" in log and f"; {world / 'reward'} has weights of its own" in log
    assert all(file.read_bytes() == expected for file, expected in files.items())
    assert [row["objective/scores"] for row in read_metrics(folder)] == [row["objective/scores"] for row in rows]


def test_sharding_an_adapter_is_refused(world: Path) -> None:
    with pytest.raises(ValueError, match=r"sharding = fsdp2 and lora\.rank = 4 exclude each other"):
        ppo_config(world, lora=RANK_4, sharding="fsdp2", num_learners=2, num_rollout_workers=1)
