"""One base for all processes: its file, whose weights open as the folder's do; what adapters over it say; runs."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import Workers, adapt_reward, make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.config import LoRA
from rlhf_ray.generation import Sampling, make_engine
from rlhf_ray.generation.packed import MixedGPT2, as_it_is, pack
from rlhf_ray.models import GPT2
from rlhf_ray.models.adapter_folders import BASES, Base, reward_model_over
from rlhf_ray.models.hf_weights import load_policy, load_reward_model
from rlhf_ray.models.lora import adapted_layers, with_adapters, with_plain_embeddings
from rlhf_ray.models.shared_base import ALIGNMENT, FrozenBase, memory_of
from rlhf_ray.run import read_metrics
from rlhf_ray.workers.lending import Lent, borrow, lend, lend_model

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 280, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_world(folder)
    adapt_reward(folder)
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_RAY_CACHE", str(tmp_path))
    return tmp_path


def base_of(world: Path, kind: str = "float32", **changes: Any) -> FrozenBase:
    return FrozenBase(base=Base.of(world / "policy", frozen=kind), **changes)


def assert_same(found: GPT2, expected: GPT2) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype and torch.equal(ours[name], x), name


# -- the file


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_a_mapped_base_is_what_its_folder_opens_as(world: Path, own_cache: Path, kind: str) -> None:
    base = base_of(world, kind)
    model = base.open()
    assert_same(model, replace(base, shared=False).open())
    assert str(base.file()) in Path("/proc/self/maps").read_text(encoding="utf-8")
    memory = memory_of(model)
    assert memory is not None and memory.nbytes == base.file().stat().st_size
    assert all(x.data_ptr() % ALIGNMENT == 0 for x in model.state_dict().values())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert base.open() is model  # in one process


def test_an_accident_stays_in_its_process_and_an_altered_file_is_made_anew(world: Path, own_cache: Path) -> None:
    base = base_of(world)
    model, content = base.open(), base.file().read_bytes()
    with torch.no_grad():
        model.wte.weight.add_(1.0)
    assert base.file(read_through=True).read_bytes() == content
    file = base.file()
    file.chmod(0o600)
    file.write_bytes(content[:-1] + b"x")
    assert base.file(read_through=True).read_bytes() == content


def test_where_nothing_can_be_kept_each_process_has_a_copy_and_says_so(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("RLHF_RAY_CACHE", str(tmp_path / "file" / "cache"))
    assert_same(base_of(world).open(), load_policy(world / "policy"))
    assert "no file that processes could share, so this one has a copy" in capsys.readouterr().out


# -- adapters over it


def test_a_reward_model_of_adapters_over_the_base_scores_as_its_merged_one(world: Path) -> None:
    base, folder = base_of(world), world / "reward"
    assert base.base.is_under(folder)
    policy, merged = base.open(), load_reward_model(folder).eval()
    over = reward_model_over(policy, folder).eval()
    mask = torch.ones_like(TOKENS)
    torch.testing.assert_close(over(TOKENS, mask), merged(TOKENS, mask), atol=1e-5, rtol=1e-5)
    assert {p.data_ptr() for p in policy.parameters()} < {p.data_ptr() for p in over.parameters()}
    assert base_of(world, "int8").base.is_under(folder)  # it was trained over whole weights
    assert not replace(base.base, sha256="another").is_under(folder)
    assert not base.base.is_under(world / "policy")
    known = (folder / BASES).read_text(encoding="utf-8")
    (folder / BASES).write_text(known.replace('"float32"', '"int8"'), encoding="utf-8")
    assert not base.base.is_under(folder) and base_of(world, "int8").base.is_under(folder)
    (folder / BASES).write_text(known, encoding="utf-8")


@pytest.mark.parametrize("kind", ["float32", "int8"])
@torch.no_grad()
def test_generation_beside_a_base_says_what_merged_weights_say(world: Path, kind: str) -> None:
    """The first is for a GPU, which has no room for merged copies; the second for a CPU, which packs them anyway."""
    adapted = with_adapters(base_of(world, kind).open(), LoRA(rank=2), seed=0)
    for _, layer in adapted_layers(adapted):
        layer.B.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        policy = with_plain_embeddings(adapted.requires_grad_(False), dtype)
        for form in (as_it_is, pack):
            model = form(policy)
            logits[form, dtype] = model.logits(model(TOKENS))
            assert isinstance(model, MixedGPT2) == (form is as_it_is and dtype == torch.bfloat16)
    whole = adapted.logits(adapted(TOKENS)) if kind == "float32" else logits[as_it_is, torch.float32]
    torch.testing.assert_close(logits[as_it_is, torch.float32], whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[pack, torch.float32], whole, atol=1e-4, rtol=1e-4)
    for form in (as_it_is, pack):
        assert 0 < (logits[form, torch.bfloat16] - whole).abs().max() < 0.2


# -- runs


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_run_has_the_same_bits_with_and_without_sharing(world: Path, kind: str) -> None:
    runs, files = [], []
    for shared in (True, False):
        memory = {"frozen": kind, "share_base": shared}
        config = ppo_config(world, run=f"{kind}-{shared}", total_steps=2, lora={"rank": 2}, memory=memory)
        folder = app.train_ppo(config)
        rows = read_metrics(folder)
        runs.append([{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows])
        files.append({f.name: f.read_bytes() for f in (folder / "step_000002").rglob("*.safetensors")})
        said = "read one copy of" in (folder / "log.txt").read_text(encoding="utf-8")
        assert said == shared
    assert runs[0] == runs[1] and len(runs[0]) == 2
    assert files[0] == files[1]


def test_a_run_whose_base_can_not_be_kept_has_copies_and_says_so(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("RLHF_RAY_CACHE", str(tmp_path / "file"))
    folder = app.train_ppo(ppo_config(world, run="nowhere", total_steps=1, lora={"rank": 2}))
    assert f"every process has a copy of {world / 'policy'}: " in (folder / "log.txt").read_text(encoding="utf-8")


def test_learning_and_resuming_write_to_no_page_of_the_base(world: Path, tmp_path: Path, own_cache: Path) -> None:
    workers = Workers.build(ppo_config(world, lora={"rank": 2}))
    workers.learner.update(workers.experience())
    workers.learner.snapshot()
    workers.learner.write(tmp_path)
    workers.learner.load(tmp_path)
    workers.rollout.update_weights(workers.learner.weights(0))
    adapters = workers.learner.model.adapters
    assert adapters
    name = str(FrozenBase(base=adapters.bases["policy"]).file())
    _, _, about = Path("/proc/self/smaps").read_text(encoding="utf-8").partition(name)
    fields = dict(line.split(":", 1) for line in about.splitlines()[1:20])
    assert fields["Private_Dirty"].split() == ["0", "kB"] and fields["Rss"].split()[0] != "0"


# -- memory of a card


def test_borrowed_memory_takes_the_place_of_the_file(world: Path) -> None:
    memory = memory_of(base_of(world, "int8").open())
    assert memory is not None
    lent = lend(memory)
    assert lend_model(base_of(world, "int8").open()) is None  # a CPU's, which a file shares
    borrowed = base_of(world, "int8", borrow=partial(borrow, lent, otherwise="a copy"))
    model = borrowed._of(borrowed._memory(CPU))
    assert model.wpe.weight.untyped_storage().data_ptr() == memory.data_ptr()
    assert_same(model, base_of(world, "int8").open())
    elsewhere = replace(borrowed, borrow=partial(borrow, replace(lent, card="another"), otherwise="a copy"))
    found = elsewhere._memory(CPU)
    assert found is not None and found.data_ptr() != memory.data_ptr() and torch.equal(found, memory)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_torch_engine_draws_from_an_unmerged_model_what_that_says(
    world: Path, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where steps are graphs, the model is never packed."""
    monkeypatch.setattr("rlhf_ray.generation.torch_engine.packable", lambda model: False)
    adapted = with_adapters(base_of(world, "int8").open(device), LoRA(rank=2), seed=0).requires_grad_(False)
    for _, layer in adapted_layers(adapted):
        layer.B.normal_(std=0.1)
    policy = with_plain_embeddings(adapted, dtype)
    engine = make_engine(policy, eos_id=1, pad_id=0, max_rows=16, kind="torch")
    prompts, uniforms = TOKENS.tolist(), np.random.default_rng(0).random((3, 8))
    first, again = (engine.generate(prompts, uniforms, Sampling(max_new_tokens=8)) for _ in range(2))
    assert [row.tokens for row in first] == [row.tokens for row in again]
    for prompt, row in zip(prompts, first, strict=True):
        whole = torch.tensor([prompt + row.tokens], device=device)
        said = adapted.logits(adapted(whole)).log_softmax(-1)[0, len(prompt) - 1 : -1].cpu()
        expected = said.gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
        found = torch.tensor(row.logprobs)
        torch.testing.assert_close(found, expected, atol=1e-3 if dtype == torch.float32 else 0.2, rtol=0)


def open_and_answer(base: FrozenBase, pipe: Connection) -> None:
    """Another process on the same card."""
    device = torch.device("cuda:0")
    lent = pipe.recv()
    assert isinstance(lent, Lent)
    before = torch.cuda.memory_allocated()
    model = replace(base, borrow=partial(borrow, lent, otherwise="a copy")).open(device)
    pipe.send((torch.cuda.memory_allocated() - before, model.logits(model(TOKENS.to(device))).cpu()))
    pipe.recv()


@pytest.mark.gpu
def test_another_process_reads_the_base_in_the_memory_of_the_card(world: Path) -> None:
    base, device = base_of(world, "int8"), torch.device("cuda:0")
    model = base.open(device)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=open_and_answer, args=(base, theirs), daemon=True)
    process.start()
    ours.send(lend_model(model))
    allocated, logits = ours.recv()
    assert allocated < 2**20
    assert torch.equal(logits, model.logits(model(TOKENS.to(device))).cpu())
    ours.send("that is all")
    process.join(60)
    assert process.exitcode == 0
