"""Uniform numbers per row, and tokens from them by inverse CDF."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.generation import Sampling, native_problem, row_uniforms, sample
from rlhf_ray.generation.native_model import NativeModel
from rlhf_ray.models import GPT2, GPT2Config

NEAR_ONE = 1 - 2**-53


def draw(logits: torch.Tensor, uniforms: list[float] | np.ndarray, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    banned = options.pop("banned", None)
    u = torch.as_tensor(uniforms, dtype=torch.float64)
    drawn = sample(logits, u, Sampling(max_new_tokens=8, **options), banned=banned)
    return drawn.tokens, drawn.logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_million_draws_follow_the_softmax(temperature: float) -> None:
    V, draws, rows = 300, 1_000_000, 2_000
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0))
    uniforms = row_uniforms(seed=1, step=2, row=3, length=draws).reshape(-1, rows)
    counts = torch.zeros(V, dtype=torch.float64)
    for part in uniforms:
        tokens, _ = draw(logits.expand(rows, V), part, temperature=temperature)
        counts += torch.bincount(tokens, minlength=V)
    expected = draws * torch.softmax(logits.double() / temperature, 0)
    assert expected.min() > 5
    chi_square = float(((counts - expected).square() / expected).sum())
    freedom = V - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("V", [1, 5, 255, 256, 257, 4103, 50264])
def test_the_token_is_where_the_cdf_crosses_the_uniform(V: int) -> None:
    generator = torch.Generator().manual_seed(V)
    logits = 3 * torch.randn(16, V, generator=generator)
    uniforms = row_uniforms(0, 0, V, 16)
    tokens, logprobs = draw(logits, uniforms)
    p = torch.softmax(logits.double(), 1)
    cdf = p.cumsum(1).gather(1, tokens[:, None])[:, 0]
    chosen = p.gather(1, tokens[:, None])[:, 0]
    u = torch.from_numpy(uniforms)
    assert (u < cdf + 1e-6).all()
    assert (u > cdf - chosen - 1e-6).all()
    torch.testing.assert_close(logprobs, chosen.log().float(), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(("first", "last"), [(0, 699), (3, 3), (255, 256), (256, 511), (600, 698)])
def test_extreme_uniforms_give_the_first_and_last_possible_token(first: int, last: int) -> None:
    logits = torch.full((2, 700), -math.inf)
    logits[:, first : last + 1] = torch.randn(last + 1 - first)
    tokens, logprobs = draw(logits, [0.0, NEAR_ONE])
    assert tokens.tolist() == [first, last]
    assert torch.isfinite(logprobs).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([-math.inf, -200.0, -1.0, 0.0, 0.5, 60.0]), min_size=1, max_size=600).filter(
        lambda values: any(math.isfinite(value) for value in values)
    ),
    st.floats(0, NEAR_ONE),
)
def test_a_drawn_token_always_has_a_probability(values: list[float], uniform: float) -> None:
    logits = torch.tensor([values])
    tokens, logprobs = draw(logits, [uniform])
    assert torch.softmax(logits, 1)[0, tokens[0]] > 0
    assert math.isfinite(logprobs[0])


def test_temperature_0_is_greedy_and_reports_the_distribution_at_1() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    tokens, logprobs = draw(logits, [0.99], temperature=0.0)
    assert tokens.tolist() == [1]
    assert logprobs[0].item() == pytest.approx(3 - math.log(math.e + math.e**3 + math.e**2), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {2}),
        ({"top_k": 3}, {0, 2, 3}),
        ({"top_p": 0.41}, {0, 2}),
        ({"top_p": 0.40}, {2}),
        ({"top_k": 2, "top_p": 0.99}, {0, 2}),
        ({"top_k": 2, "top_p": 0.5}, {2}),
        ({"top_p": 1e-9}, {2}),
        ({"top_k": 99}, {0, 1, 2, 3}),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(options: dict[str, Any], kept: set[int]) -> None:
    p = torch.tensor([0.3, 0.1, 0.4000001, 0.2])
    uniforms = np.linspace(0, NEAR_ONE, 200)
    tokens, logprobs = draw(p.log().expand(200, 4), uniforms, **options)
    assert set(tokens.tolist()) == kept
    torch.testing.assert_close(logprobs, p.log()[tokens] - p.sum().log(), atol=1e-6, rtol=0)


def test_banned_tokens_are_not_drawn_and_logprobs_stay_those_of_the_full_distribution() -> None:
    logits = torch.zeros(100, 4)
    logits[:, 1] = 500.0
    banned = torch.zeros(100, 4, dtype=torch.bool)
    banned[:, 1] = True
    for temperature in (1.0, 0.0):
        tokens, logprobs = draw(logits, np.linspace(0, NEAR_ONE, 100), banned=banned, temperature=temperature)
        assert 1 not in tokens.tolist()
        torch.testing.assert_close(logprobs, torch.full((100,), -500.0))


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(4, 300)
    before = logits.clone()
    draw(logits, [0.5] * 4, temperature=0.5, top_k=3)
    draw(logits, [0.5] * 4)
    assert torch.equal(logits, before)


def test_a_row_has_its_own_stream_whose_start_does_not_depend_on_its_length() -> None:
    base = row_uniforms(1, 2, 3, 1000)
    assert base.dtype == np.float64
    assert np.array_equal(row_uniforms(1, 2, 3, 10), base[:10])
    for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (1, 2, 2**64 - 1)]:
        stream = row_uniforms(*other, 1000)
        assert abs(np.corrcoef(stream, base)[0, 1]) < 0.15
        assert not np.intersect1d(stream, base).size
    # Frozen: a change would silently give every resumed run other rows.
    assert row_uniforms(0, 0, 0, 3).tolist() == [0.011546754286331562, 0.24154919656271812, 0.11142585551493822]


@pytest.mark.parametrize("key", [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (2**64, 0, 0)])
def test_impossible_keys_are_refused(key: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 0 and below 2\*\*64"):
        row_uniforms(*key, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"min_new_tokens": 9},
        {"min_new_tokens": -1},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_impossible_sampling_is_refused_by_name(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is"):
        Sampling(**({"max_new_tokens": 8} | options))


@given(
    V=st.integers(1, 700),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    seed=st.integers(0, 10_000),
    ban=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_the_native_draw_is_the_plain_one(V: int, temperature: float, seed: int, ban: bool) -> None:
    model = GPT2(GPT2Config(vocab_size=5, n_positions=4, n_embd=16, n_layer=1, n_head=1))
    if native_problem(model):
        return
    logits = 4 * torch.randn(16, V, generator=torch.Generator().manual_seed(seed))
    u = row_uniforms(seed, 1, 2, 16)
    banned = np.full(16, -1)
    mask = torch.zeros(16, V, dtype=torch.bool)
    if ban and V > 1:
        banned[::2] = seed % V
        mask[::2, seed % V] = True
    tokens, logprobs, log_kept = NativeModel(model).draw(logits, u, banned, temperature)
    plain = sample(logits, torch.from_numpy(u), Sampling(max_new_tokens=1, temperature=temperature), banned=mask)
    p = (logits.double() / temperature).masked_fill(mask, -math.inf).softmax(1)
    edges = p.cumsum(1)
    close = (edges - torch.from_numpy(u)[:, None]).abs().amin(1) < 1e-5  # rounding may put these on either side
    same = torch.from_numpy(tokens) == plain.tokens
    assert (same | close).all()
    torch.testing.assert_close(torch.from_numpy(logprobs)[same], plain.logprobs[same], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(torch.from_numpy(log_kept)[same], plain.log_kept[same], atol=2e-5, rtol=1e-5)
