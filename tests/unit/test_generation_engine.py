"""The engine against full forward passes, against transformers, and against itself in other batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from rlhf_ray.generation import ENGINES, Completion, Engine, Sampling, row_uniforms
from rlhf_ray.models import GPT2, GPT2Config, preset
from rlhf_ray.models.hf_weights import save_policy
from rlhf_ray.ops.logprobs import token_logprobs

CONFIG = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
EOS, PAD = 92, 90


def random_model(config: GPT2Config = CONFIG, dtype: torch.dtype = torch.float32) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_prompts(count: int, longest: int, vocab_size: int = 97) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, size=rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def uniforms(rows: list[int], length: int) -> np.ndarray:
    return np.stack([row_uniforms(0, 0, row, length) for row in rows])


def engine(model: GPT2, max_rows: int = 64, eos_id: int = EOS) -> Engine:
    return ENGINES["torch"](model, eos_id=eos_id, pad_id=PAD, max_rows=max_rows)


def check_against_full_forward(
    model: GPT2, prompts: list[list[int]], completions: list[Completion], temperature: float, atol: float = 1e-4
) -> None:
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.tensor([prompt + completion.tokens])
        mask = torch.arange(tokens.shape[1])[None] >= len(prompt)
        with torch.no_grad():
            expected, _ = token_logprobs(model(tokens), model.wte.weight, tokens, mask, temperature=temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected[0, len(prompt) :], atol=atol, rtol=0)


@pytest.mark.parametrize("max_rows", [1, 32, 64])
def test_tokens_and_logprobs_are_those_of_the_full_forward(max_rows: int) -> None:
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


def test_a_row_depends_on_its_prompt_and_uniforms_alone() -> None:
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


def test_greedy_equals_transformers(tmp_path: Path) -> None:
    for name, new in (("tiny", 24), ("mini_xl", 12)):
        model = random_model(preset(name, 211))
        save_policy(model, tmp_path / name, pad_id=200, bos_id=201, eos_id=202)
        peer = GPT2LMHeadModel.from_pretrained(tmp_path / name).eval()
        own = ENGINES["torch"](model, eos_id=202, pad_id=200)
        prompts = random_prompts(5, 15, 200)
        completions = own.generate(prompts, np.zeros((5, new)), Sampling(max_new_tokens=new, temperature=0.0))
        for prompt, completion in zip(prompts, completions, strict=True):
            tokens = torch.tensor([prompt])
            expected = peer.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False
            )
            assert completion.tokens == expected[0, len(prompt) :].tolist()


def test_stream_gives_the_tokens_of_generate() -> None:
    model = random_model()
    own = engine(model)
    prompts, u = random_prompts(12, 20), uniforms(list(range(12)), 30)
    sampling = Sampling(max_new_tokens=30, min_new_tokens=5, top_k=20)
    for row, completion in enumerate(own.generate(prompts, u, sampling)):
        assert list(own.stream(prompts[row], u[row], sampling)) == completion.tokens


def eager_for_eos(bias: float) -> GPT2:
    """A model in which EOS is likely everywhere."""
    model = random_model()
    with torch.no_grad():
        model.ln_f.bias.copy_(bias * model.wte.weight[EOS])
    return model


def test_min_new_tokens_holds_eos_back() -> None:
    model = eager_for_eos(100.0)
    prompts, u = random_prompts(20, 10), uniforms(list(range(20)), 12)
    for minimum in (0, 1, 2, 7, 12):
        completions = engine(model).generate(prompts, u, Sampling(max_new_tokens=12, min_new_tokens=minimum))
        assert {len(c.tokens) for c in completions} == {max(minimum, 1)}
        assert all(c.finished for c in completions)
        check_against_full_forward(model, prompts, completions, 1.0, atol=1e-3)


def test_ended_rows_make_room_for_waiting_prompts() -> None:
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
    expected = engine(model, max_rows=16).generate(prompts, u, sampling)
    as_on_a_gpu = engine(model, max_rows=16)
    as_on_a_gpu.burst, as_on_a_gpu.width_block = 8, 128
    completions = as_on_a_gpu.generate(prompts, u, sampling)
    assert [c.tokens for c in completions] == [c.tokens for c in expected]
    assert len({len(c.tokens) for c in completions}) > 5


def test_changed_weights_are_noticed() -> None:
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


def test_generation_leaves_training_untouched() -> None:
    model = random_model(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=4, dropout=0.5))
    prompts, u, sampling = random_prompts(3, 8), uniforms([0, 1, 2], 16), Sampling(max_new_tokens=16)
    completions = engine(model).generate(prompts, u, sampling)
    assert model.training
    check_against_full_forward(model.eval(), prompts, completions, 1.0)
    model.train()(torch.arange(5)[None]).sum().backward()
    assert model.wpe.weight.grad is not None


def test_bfloat16_weights_generate() -> None:
    model = random_model(dtype=torch.bfloat16)
    prompts, u = random_prompts(20, 20), uniforms(list(range(20)), 16)
    completions = engine(model).generate(prompts, u, Sampling(max_new_tokens=16))
    check_against_full_forward(model, prompts, completions, 1.0, atol=0.15)


def test_a_prompt_may_fill_the_context_exactly() -> None:
    model = random_model()
    prompts, u = [[1] * 60, [2]], uniforms([0, 1], 4)
    completions = engine(model, eos_id=96).generate(prompts, u, Sampling(max_new_tokens=4))
    check_against_full_forward(model, prompts, completions, 1.0)
    assert engine(model).generate([], np.zeros((0, 4)), Sampling(max_new_tokens=4)) == []


def test_what_cannot_be_generated_is_refused() -> None:
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
