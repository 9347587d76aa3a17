"""The reward model, the critic and the shared value head."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from rlhf_ray.models import GPT2, GPT2Config, SharedValueHead, ValueModel
from rlhf_ray.models.layout import Layout
from rlhf_ray.ops.logprobs import at_tokens, before

CONFIG = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
EOS = 90


def random_value_model() -> ValueModel:
    torch.manual_seed(0)
    model = ValueModel(GPT2(CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.set_normaliser(mean=0.3, std=0.5)
    return model


@pytest.mark.parametrize("with_eos", [False, True])
def test_the_score_does_not_depend_on_padding(with_eos: bool) -> None:
    model = random_value_model()
    row = torch.randint(0, 90, (6,))
    if with_eos:
        row[-1] = EOS
    expected = model(row[None], torch.ones(1, 6))
    for pad in [(0, 1), (0, 9), (1, 0), (9, 0), (3, 4)]:
        for pad_id in (EOS, 96):
            tokens, mask = F.pad(row, pad, value=pad_id)[None], F.pad(torch.ones(6), pad)[None]
            torch.testing.assert_close(model(tokens, mask), expected, atol=1e-5, rtol=0)


def test_the_score_is_the_value_at_the_last_real_token() -> None:
    model = random_value_model()
    tokens = torch.randint(0, 90, (2, 8))
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3]).bool()
    values = model.values(tokens, Layout.of(mask, read=mask))  # (13,), row by row
    scores = model(tokens, mask)
    torch.testing.assert_close(scores, values[[7, 12]])
    hidden = model.trunk(tokens[:1])
    raw = (hidden @ model.score.weight[0] + model.score.bias)[0]
    torch.testing.assert_close(values[:8], (raw - 0.3) / 0.5, atol=1e-5, rtol=0)


def test_the_score_starts_as_the_paper_has_it() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=5, n_positions=4, n_embd=4096, n_layer=1, n_head=1)
    with torch.device("meta"):
        trunk = GPT2(config, device="meta")
    trunk.wte = torch.nn.Embedding(5, 4096)
    model = ValueModel(trunk)
    assert model.score.weight.std().item() == pytest.approx(1 / math.sqrt(4097), rel=0.05)
    assert model.score.bias.item() == 0
    assert (model.reward_gain.item(), model.reward_bias.item()) == (1, 0)


def test_the_normaliser_composes_and_gives_mean_0_and_deviation_1() -> None:
    model = random_value_model()
    tokens, mask = torch.randint(0, 90, (64, 8)), torch.ones(64, 8)
    with torch.no_grad():
        scores = model(tokens, mask)
        model.set_normaliser(mean=scores.mean().item(), std=scores.std().item())
        normalised = model(tokens, mask)
    assert normalised.mean().item() == pytest.approx(0, abs=1e-4)
    assert normalised.std().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("std", [0.0, -1.0, math.inf, math.nan])
def test_a_normaliser_without_spread_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="std"):
        random_value_model().set_normaliser(mean=0.0, std=std)


def test_the_shared_head_starts_at_zero_and_learns() -> None:
    trunk = GPT2(CONFIG)
    head = SharedValueHead(trunk)
    hidden = trunk(torch.arange(6)[None])
    values = head(hidden)
    assert values.shape == (1, 6)
    assert not values.any()
    (values - 1).square().sum().backward()
    torch.testing.assert_close(head.weight.grad[0], -2 * hidden[0].sum(0), atol=1e-4, rtol=0)


def test_what_is_read_before_a_token_belongs_to_it() -> None:
    mask = torch.tensor([[False, True, True], [True, False, True]])
    assert before(mask).tolist() == [[True, True, False], [False, True, False]]
    assert at_tokens(torch.tensor([1.0, 2.0, 3.0]), mask).tolist() == [[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]]
