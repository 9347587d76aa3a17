"""CUDA graphs draw what the steps that they hold draw: ended rows, refills, smaller batches, new weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import (
    EOS,
    PAD,
    SAMPLINGS,
    check_against_full_forward,
    eager_for_eos,
    make_step,
    random_model,
    random_prompts,
    uniforms,
)

from rlhf_ray.generation.graphs import Graphs
from rlhf_ray.generation.requests import Completion
from rlhf_ray.generation.sampling import Sampling
from rlhf_ray.generation.torch_engine import COARSE, TorchEngine
from rlhf_ray.models import GPT2, GPT2Config
from rlhf_ray.models.flat import flat_weights, load_flat_weights

pytestmark = pytest.mark.gpu

LONG = GPT2Config(vocab_size=97, n_positions=256, n_embd=32, n_layer=2, n_head=2)


def make_engine(model: GPT2, *, graphs: bool = True) -> TorchEngine:
    engine = TorchEngine(model, eos_id=EOS, pad_id=PAD, max_rows=64)
    assert engine.grain == COARSE
    engine.grain = replace(COARSE, graphs=graphs)
    return engine


def assert_same(some: list[Completion], others: list[Completion], atol: float = 1e-5) -> None:
    assert [c.tokens for c in some] == [c.tokens for c in others]
    for name in ("logprobs", "log_kept"):
        for one, other in zip(some, others, strict=True):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=atol, rtol=0)


@contextmanager
def never_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sampling", SAMPLINGS)
@torch.inference_mode()
def test_a_replayed_step_leaves_what_the_step_leaves_and_never_waits(sampling: Sampling) -> None:
    eager, captured = (make_step(random_model().cuda(), sampling) for _ in range(2))
    graphs = Graphs(captured)
    for step in (eager, captured):
        step.record.begin(uniforms(list(range(32)), 20))
        step.slots.start(np.arange(12), np.arange(12), lengths=np.zeros(12, np.int64), last=np.arange(12))
    graphs.run(16, 48)
    eager.run(16, 48)
    with never_waiting():
        for _ in range(15):
            graphs.run(16, 48)
            eager.run(16, 48)
    assert torch.equal(captured.record.tokens, eager.record.tokens)
    torch.testing.assert_close(captured.record.logprobs, eager.record.logprobs, atol=1e-5, rtol=0)
    assert torch.equal(captured.slots.cache.lengths, eager.slots.cache.lengths)
    assert captured.slots.cache.lengths[:12].tolist() == [16] * 12


@pytest.mark.parametrize("sampling", [replace(sampling, max_new_tokens=100) for sampling in SAMPLINGS])
def test_rows_that_end_are_replaced_and_batches_shrink_as_without_graphs(sampling: Sampling) -> None:
    model = eager_for_eos(2.0, LONG).cuda()
    prompts, u = random_prompts(150, 60), uniforms(list(range(150)), 100)
    engine = make_engine(model)
    for few in (150, 20, 150):  # the memory of the first call serves the others
        completions = engine.generate(prompts[:few], u[:few], sampling)
        assert_same(completions, make_engine(model, graphs=False).generate(prompts[:few], u[:few], sampling))
        check_against_full_forward(model, prompts[:few], completions, sampling.temperature or 1.0)


def test_graphs_stay_valid_when_weights_are_updated_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = []
    capture = Graphs._capture

    def counted(self: Graphs, rows: int, reach: int) -> torch.cuda.CUDAGraph:
        captures.append((rows, reach))
        return capture(self, rows, reach)

    monkeypatch.setattr(Graphs, "_capture", counted)
    model, updated = random_model().cuda(), eager_for_eos(2.0).cuda()
    prompts, u, sampling = random_prompts(100, 20), uniforms(list(range(100)), 40), Sampling(max_new_tokens=40)
    engine = make_engine(model)
    first = engine.generate(prompts, u, sampling)
    engine.generate(prompts[:3], u[:3], sampling)
    before = len(captures)
    assert before == len(set(captures)) > 1
    load_flat_weights(model, flat_weights(updated))
    second = engine.generate(prompts, u, sampling)
    assert set(captures[before:]).isdisjoint(captures[:before])  # at most sizes that the first weights never needed
    assert second != first
    assert_same(second, make_engine(updated, graphs=False).generate(prompts, u, sampling))


def test_a_larger_cache_takes_graphs_of_its_own() -> None:
    model = random_model(LONG).cuda()
    engine, sampling = make_engine(model), Sampling(max_new_tokens=20)
    for longest, count in ((20, 10), (200, 60), (20, 10)):
        prompts, u = random_prompts(count, longest), uniforms(list(range(count)), 20)
        check_against_full_forward(model, prompts, engine.generate(prompts, u, sampling), 1.0)


def test_bfloat16_weights_and_cache() -> None:
    model = random_model(dtype=torch.bfloat16).cuda()
    prompts, u, sampling = random_prompts(70, 20), uniforms(list(range(70)), 24), Sampling(max_new_tokens=24)
    completions = make_engine(model).generate(prompts, u, sampling)
    check_against_full_forward(model, prompts, completions, 1.0, atol=0.15)
    states = torch.randn(5, 32, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        exact = states.double() @ model.wte.weight.double().t()
        torch.testing.assert_close(model.logits(states).double(), exact, atol=1e-4, rtol=1e-4)
