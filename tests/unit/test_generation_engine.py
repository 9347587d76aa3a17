"""Each engine against full forward passes, against transformers, and against itself in other batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import (
    EOS,
    PAD,
    check_against_full_forward,
    eager_for_eos,
    random_model,
    random_prompts,
    uniforms,
)
from transformers import GPT2LMHeadModel

from rlhf_ray.generation import ENGINES, Engine, Sampling, make_engine, native_problem
from rlhf_ray.generation.requests import TextOf
from rlhf_ray.generation.torch_engine import COARSE, TorchEngine
from rlhf_ray.models import GPT2, GPT2Config, preset
from rlhf_ray.models.hf_weights import save_policy

Make = Callable[..., Engine]


@pytest.fixture(params=[kind for kind in ENGINES if kind != "native" or not native_problem(random_model())])
def engine(request: pytest.FixtureRequest) -> Make:
    def make(model: GPT2, max_rows: int = 64, eos_id: int = EOS, text: TextOf | None = None) -> Engine:
        return make_engine(model, eos_id=eos_id, pad_id=PAD, max_rows=max_rows, kind=request.param, text=text)

    return make


@pytest.mark.parametrize("max_rows", [1, 32, 64])
def test_tokens_and_logprobs_are_those_of_the_full_forward(engine: Make, max_rows: int) -> None:
    model = random_model()
    prompts, n = random_prompts(70, 20), 24
    u = uniforms(list(range(70)), n)
    sampling = Sampling(max_new_tokens=n, temperature=0.8)
    completions = engine(model, max_rows).generate(prompts, u, sampling)
    assert any(c.finished for c in completions)
    assert any(not c.finished for c in completions)
    for completion in completions:
        assert len(completion.logprobs) == len(completion.tokens)
        assert completion.finished == (completion.tokens[-1] == EOS)
        assert EOS not in completion.tokens[:-1]
        assert completion.finished or len(completion.tokens) == n
    check_against_full_forward(model, prompts, completions, 0.8)
    for b in range(0, 70, 7):  # and each token is the one that its uniform asks for
        row = prompts[b] + completions[b].tokens
        with torch.no_grad():
            p = torch.softmax(model.logits(model(torch.tensor([row])))[0].double() / 0.8, 1)
        for t, token in enumerate(completions[b].tokens):
            cdf = p[len(prompts[b]) + t - 1].cumsum(0)
            assert cdf[token] - p[len(prompts[b]) + t - 1, token] - 1e-5 < u[b, t] < cdf[token] + 1e-5


def test_a_row_depends_on_its_prompt_and_uniforms_alone(engine: Make) -> None:
    model = random_model(preset("tiny", 4103))
    count, n = 40, 20
    prompts = random_prompts(count, 230, 4103)
    u = uniforms(list(range(count)), n)
    sampling = Sampling(max_new_tokens=n)
    expected = engine(model).generate(prompts, u, sampling)
    order = np.random.default_rng(1).permutation(count)
    shuffled = engine(model, max_rows=16).generate([prompts[i] for i in order], u[order], sampling)
    assert [shuffled[k] for k in np.argsort(order)] == expected  # logprobs too, to the last bit
    used = engine(model, max_rows=32)
    for part in (slice(0, 1), slice(1, 4), slice(4, 21), slice(21, 40)):
        assert used.generate(prompts[part], u[part], sampling) == expected[part]


def test_greedy_equals_transformers(engine: Make, tmp_path: Path) -> None:
    for name, new in (("tiny", 24), ("mini_xl", 12)):
        model = random_model(preset(name, 211))
        save_policy(model, tmp_path / name, pad_id=200, bos_id=201, eos_id=202)
        peer = GPT2LMHeadModel.from_pretrained(tmp_path / name).eval()
        own = engine(model, eos_id=202)
        prompts = random_prompts(5, 15, 200)
        completions = own.generate(prompts, np.zeros((5, new)), Sampling(max_new_tokens=new, temperature=0.0))
        for prompt, completion in zip(prompts, completions, strict=True):
            tokens = torch.tensor([prompt])
            expected = peer.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False
            )
            assert completion.tokens == expected[0, len(prompt) :].tolist()


def test_stream_gives_the_tokens_of_generate(engine: Make) -> None:
    model = random_model()
    own = engine(model)
    prompts, u = random_prompts(12, 20), uniforms(list(range(12)), 30)
    sampling = Sampling(max_new_tokens=30, min_new_tokens=5, top_k=20)
    for row, completion in enumerate(own.generate(prompts, u, sampling)):
        assert list(own.stream(prompts[row], u[row], sampling)) == completion.tokens


def test_min_new_tokens_holds_eos_back(engine: Make) -> None:
    model = eager_for_eos(100.0)
    prompts, u = random_prompts(20, 10), uniforms(list(range(20)), 12)
    for minimum in (0, 1, 2, 7, 12):
        completions = engine(model).generate(prompts, u, Sampling(max_new_tokens=12, min_new_tokens=minimum))
        assert {len(c.tokens) for c in completions} == {max(minimum, 1)}
        assert all(c.finished for c in completions)
        check_against_full_forward(model, prompts, completions, 1.0, atol=1e-3)


def test_ended_rows_make_room_for_waiting_prompts(engine: Make) -> None:
    model = eager_for_eos(2.0)
    prompts, n = random_prompts(200, 12), 40
    u = uniforms(list(range(200)), n)
    completions = engine(model, max_rows=16).generate(prompts, u, Sampling(max_new_tokens=n))
    lengths = [len(c.tokens) for c in completions]
    assert len(set(lengths)) > 5
    check_against_full_forward(model, prompts, completions, 1.0)


def test_looking_seldom_at_wide_prefills_changes_nothing() -> None:
    model = eager_for_eos(2.0)
    prompts, n = random_prompts(50, 30), 21
    u, sampling = uniforms(list(range(50)), n), Sampling(max_new_tokens=n)
    expected = TorchEngine(model, eos_id=EOS, pad_id=PAD, max_rows=16).generate(prompts, u, sampling)
    as_on_a_gpu = TorchEngine(model, eos_id=EOS, pad_id=PAD, max_rows=16)
    as_on_a_gpu.grain = replace(COARSE, graphs=False)
    completions = as_on_a_gpu.generate(prompts, u, sampling)
    assert [c.tokens for c in completions] == [c.tokens for c in expected]
    assert len({len(c.tokens) for c in completions}) > 5


def test_changed_weights_are_noticed(engine: Make) -> None:
    model = random_model()
    own = engine(model)
    prompts, u, sampling = random_prompts(3, 8), uniforms([0, 1, 2], 16), Sampling(max_new_tokens=16)
    first = own.generate(prompts, u, sampling)
    assert own.generate(prompts, u, sampling) == first
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight.mul_(1.5)
    second = own.generate(prompts, u, sampling)
    assert second != first
    check_against_full_forward(model, prompts, second, 1.0)


def test_generation_leaves_training_untouched(engine: Make) -> None:
    model = random_model(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=2, dropout=0.5))
    prompts, u, sampling = random_prompts(3, 8), uniforms([0, 1, 2], 16), Sampling(max_new_tokens=16)
    completions = engine(model).generate(prompts, u, sampling)
    assert model.training
    check_against_full_forward(model.eval(), prompts, completions, 1.0)
    model.train()(torch.arange(5)[None]).sum().backward()
    assert model.wpe.weight.grad is not None


def test_bfloat16_weights_generate(engine: Make) -> None:
    model = random_model(dtype=torch.bfloat16)
    prompts, u = random_prompts(20, 20), uniforms(list(range(20)), 16)
    completions = engine(model).generate(prompts, u, Sampling(max_new_tokens=16))
    check_against_full_forward(model, prompts, completions, 1.0, atol=0.15)


def test_a_prompt_may_fill_the_context_exactly(engine: Make) -> None:
    model = random_model()
    prompts, u = [[1] * 60, [2]], uniforms([0, 1], 4)
    completions = engine(model, eos_id=96).generate(prompts, u, Sampling(max_new_tokens=4))
    check_against_full_forward(model, prompts, completions, 1.0)
    assert engine(model).generate([], np.zeros((0, 4)), Sampling(max_new_tokens=4)) == []


def test_what_cannot_be_generated_is_refused(engine: Make) -> None:
    own, sampling = engine(random_model()), Sampling(max_new_tokens=8)
    with pytest.raises(ValueError, match=r"prompt 1 has 57 tokens and max_new_tokens is 8.*n_positions 64"):
        own.generate([[1], [1] * 57], np.zeros((2, 8)), sampling)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        own.generate([[]], np.zeros((1, 8)), sampling)
    with pytest.raises(ValueError, match=r"uniforms are \(1, 7\)"):
        own.generate([[1]], np.zeros((1, 7)), sampling)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        list(own.stream([], np.zeros(8), sampling))
    with pytest.raises(ValueError, match="max_rows is 0"):
        engine(random_model(), max_rows=0)


def test_siblings_share_one_prefill_and_answer_as_alone(engine: Make) -> None:
    model = eager_for_eos(2.0)
    prompts = [prompt for prompt in random_prompts(12, 30) for _ in range(4)]
    u, sampling = uniforms(list(range(48)), 20), Sampling(max_new_tokens=20)
    together = engine(model, max_rows=16).generate(prompts, u, sampling)
    for row in range(0, 48, 5):
        alone = engine(model).generate([prompts[row]], u[row : row + 1], sampling)
        assert together[row] == alone[0]
    assert len({tuple(c.tokens) for c in together}) > 30


def test_stop_ids_and_strings_end_a_response_where_they_are_complete(engine: Make) -> None:
    model, n = random_model(), 40
    prompts, u = random_prompts(60, 10), uniforms(list(range(60)), n)

    def text(tokens: Sequence[int]) -> bytes:
        return b"".join(b"%02d." % token for token in tokens)

    free = engine(model).generate(prompts, u, Sampling(max_new_tokens=n))
    first = free[0].tokens
    string = text(first[4:6])[1:4].decode()  # from inside one token into the next
    sampling = Sampling(max_new_tokens=n, min_new_tokens=3, stop_ids=(7, first[9]), stop=(string,))
    unstopped = engine(model).generate(prompts, u, Sampling(max_new_tokens=n, min_new_tokens=3))
    stopped = engine(model, max_rows=16, text=text).generate(prompts, u, sampling)
    endings = 0
    for free_row, row in zip(unstopped, stopped, strict=True):
        if free_row.tokens[:2] != row.tokens[:2] or {7, first[9]} & set(free_row.tokens[:2]):
            continue  # held back from its stop, it went another way
        ends = [
            t
            for t in range(1, len(free_row.tokens) + 1)
            if t >= 3 and (free_row.tokens[t - 1] in (7, first[9], EOS) or string.encode() in text(free_row.tokens[:t]))
        ]
        end = ends[0] if ends else n
        assert row.tokens == free_row.tokens[:end]
        assert row.finished == bool(ends)
        endings += string.encode() in text(row.tokens)
    assert endings >= 1
    with pytest.raises(ValueError, match="stop strings need"):
        engine(model).generate(prompts, u, sampling)


def test_what_is_left_out_of_a_draw_is_reported(engine: Make) -> None:
    model = random_model()
    prompts, u = random_prompts(30, 10), uniforms(list(range(30)), 8)
    for options in ({"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 20, "min_p": 0.1}, {"min_new_tokens": 8}):
        sampling = Sampling(max_new_tokens=8, temperature=0.7, **options)
        for prompt, completion in zip(prompts, engine(model).generate(prompts, u, sampling), strict=True):
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([prompt + completion.tokens])))[0, len(prompt) - 1 : -1]
            p = (logits.double() / 0.7).softmax(1)
            for t, (token, kept) in enumerate(zip(completion.tokens, completion.log_kept, strict=True)):
                order = p[t].argsort(descending=True)
                mass = torch.ones(len(p[t]), dtype=torch.bool)
                mass[order[sampling.top_k or len(order) :]] = False
                if sampling.top_p < 1:
                    mass[order[1:]] &= (p[t, order].cumsum(0) < sampling.top_p)[:-1]
                mass &= p[t] >= sampling.min_p * p[t].max()
                if t + 1 < sampling.min_new_tokens:
                    mass[EOS] = False
                assert mass[token]
                assert kept == pytest.approx(float(p[t, mass].sum().log()), abs=1e-4)
