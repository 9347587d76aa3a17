"""The own GPT-2 against transformers', and against itself under padding, packing and caching."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config as PeerConfig
from transformers import GPT2LMHeadModel

from rlhf_ray.models import GPT2, MODELS, PRESETS, GPT2Config, KVCache, preset
from rlhf_ray.models.hf_weights import load_policy

# The larger shapes keep their width and heads but not their depth: xl whole would be 6 GB.
DEPTHS = {"tiny": 4, "mini_xl": 12, "small": 2, "medium": 2, "large": 1, "xl": 1}
SMALL = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4)


def peer_and_own(config: GPT2Config, folder: Path) -> tuple[GPT2LMHeadModel, GPT2]:
    """A transformers model with random weights, biases included, and the same one read by this project."""
    peer = GPT2LMHeadModel(
        PeerConfig(
            vocab_size=config.vocab_size,
            n_positions=config.n_positions,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    peer.save_pretrained(folder)
    return peer, load_policy(folder)


def random_model(config: GPT2Config = SMALL, seed: int = 0) -> GPT2:
    """A model far enough from its initialisation for positions and attention to matter."""
    torch.manual_seed(seed)
    model = GPT2(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def empty_cache(config: GPT2Config, rows: int, capacity: int) -> KVCache:
    return KVCache.empty(
        n_layer=config.n_layer,
        rows=rows,
        n_head=config.n_head,
        capacity=capacity,
        head_dim=config.n_embd // config.n_head,
        device="cpu",
        dtype=torch.float32,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_logits_and_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = PRESETS[name] | {"n_layer": DEPTHS[name]}
    peer, own = peer_and_own(GPT2Config(vocab_size=211, **shape), tmp_path)
    tokens = torch.randint(0, 211, (2, 13))
    expected = peer(tokens, labels=tokens)
    logits = own.logits(own(tokens))
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    expected.loss.backward()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    peer_gradients = {n.removeprefix("transformer."): p.grad for n, p in peer.named_parameters()}
    for key, parameter in own.named_parameters():
        gradient = peer_gradients[key]
        expected_gradient = gradient.t() if parameter.shape != gradient.shape else gradient
        if key.endswith("c_proj.weight") and "attn" in key:  # square, so its transposition doesn't show
            expected_gradient = gradient.t()
        torch.testing.assert_close(parameter.grad, expected_gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["tiny", "mini_xl"])
def test_logits_equal_transformers_over_the_whole_context(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = preset(name, 211)
    peer, own = peer_and_own(config, tmp_path)
    tokens = torch.randint(0, 211, (1, config.n_positions))
    with torch.no_grad():
        torch.testing.assert_close(own.logits(own(tokens)), peer(tokens).logits, atol=1e-4, rtol=0)


def test_left_padded_equals_right_padded_equals_unpadded() -> None:
    model = random_model()
    rows = [torch.randint(0, 97, (n,)) for n in (5, 9, 1)]
    width = 12
    for left in (False, True):
        sides = [(width - len(row), 0) if left else (0, width - len(row)) for row in rows]
        tokens = torch.stack([F.pad(row, side, value=96) for row, side in zip(rows, sides, strict=True)])
        mask = torch.stack([F.pad(torch.ones(len(r)), s) for r, s in zip(rows, sides, strict=True)])
        hidden = model(tokens, attention_mask=mask)
        for b, row in enumerate(rows):
            torch.testing.assert_close(hidden[b, mask[b] == 1], model(row[None])[0], atol=1e-5, rtol=0)
    right_padded_needs_no_mask = model(F.pad(rows[0], (0, 7), value=96)[None])[0, :5]
    torch.testing.assert_close(right_padded_needs_no_mask, model(rows[0][None])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_no_gradient(left: bool) -> None:
    row = torch.randint(0, 96, (6,), generator=torch.Generator().manual_seed(2))
    gradients = []
    for pad in (0, 5):
        model = random_model()
        tokens = F.pad(row, (pad, 0) if left else (0, pad), value=96)[None]
        mask = F.pad(torch.ones(6, dtype=torch.bool), (pad, 0) if left else (0, pad))[None]
        model(tokens, attention_mask=mask)[mask].square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, plain, atol=1e-4, rtol=1e-4)


def test_a_row_of_padding_alone_is_finite() -> None:
    model = random_model()
    hidden = model(torch.zeros(2, 4, dtype=torch.int64), attention_mask=torch.tensor([[0] * 4, [1, 1, 0, 0]]))
    hidden.sum().backward()
    assert torch.isfinite(hidden).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_packed_documents_equal_separate_documents() -> None:
    model = random_model()
    documents = [torch.randint(0, 97, (n,)) for n in (4, 1, 7)]
    tokens = torch.cat([*documents, torch.zeros(3, dtype=torch.int64)])[None]
    document_ids = torch.tensor([[5] * 4 + [2] + [5] * 7 + [0] * 3])  # an id may come back later
    separate = torch.cat([model(document[None])[0] for document in documents])
    torch.testing.assert_close(model(tokens, document_ids=document_ids)[0, :12], separate, atol=1e-5, rtol=0)
    mask = document_ids != 0
    flipped = model(tokens.flip(1), document_ids=document_ids.flip(1), attention_mask=mask.flip(1))
    reverse = torch.cat([model(document.flip(0)[None])[0] for document in reversed(documents)])
    torch.testing.assert_close(flipped[0, 3:], reverse, atol=1e-5, rtol=0)


def test_cached_decode_equals_the_full_forward_for_ragged_rows() -> None:
    model = random_model().eval()
    tokens = torch.randint(0, 97, (3, 20))
    lengths = torch.tensor([7, 2, 5])
    full = model(tokens)
    cache = empty_cache(SMALL, rows=3, capacity=40)
    mask = torch.arange(7) < lengths[:, None]
    first = model(tokens[:, :7], attention_mask=mask, cache=cache)
    torch.testing.assert_close(first[mask], full[:, :7][mask], atol=1e-5, rtol=0)
    assert cache.lengths.tolist() == [7, 2, 5]
    for width in (1, 3, 1):  # several tokens at once may continue a row too
        index = cache.lengths[:, None] + torch.arange(width)
        hidden = model(tokens.gather(1, index), cache=cache)
        expected = full.gather(1, index[:, :, None].expand(-1, -1, 32))
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)
    assert cache.lengths.tolist() == [12, 7, 10]


def test_rows_of_a_cache_can_be_held_back_moved_and_refilled() -> None:
    model = random_model().eval()
    tokens = torch.randint(0, 97, (3, 10))
    full = model(tokens)
    cache = empty_cache(SMALL, rows=3, capacity=16)
    model(tokens[:, :6], cache=cache)
    keep = torch.tensor([[True], [False], [True]])
    model(tokens[:, 6:7], attention_mask=keep, cache=cache)
    assert cache.lengths.tolist() == [7, 6, 7]
    cache.move(torch.tensor([2]), torch.tensor([0]))
    hidden = model(tokens[[2, 1]].gather(1, torch.tensor([[7], [6]])), cache=cache.first(2))
    torch.testing.assert_close(hidden[:, 0], torch.stack([full[2, 7], full[1, 6]]), atol=1e-5, rtol=0)
    model(tokens[1:2, :4], cache=cache.at(torch.tensor([2])))
    cache.lengths[2] = 4
    cache.longest = 8
    last = model(tokens[[2, 1, 1]].gather(1, torch.tensor([[8], [7], [4]])), cache=cache)
    torch.testing.assert_close(last[:, 0], torch.stack([full[2, 8], full[1, 7], full[1, 4]]), atol=1e-5, rtol=0)


def test_rows_beyond_the_context_or_the_cache_are_refused() -> None:
    model = random_model()
    with pytest.raises(ValueError, match=r"row length 65 exceeds n_positions 64"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    cache = empty_cache(SMALL, rows=1, capacity=80)
    model(torch.zeros(1, 64, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match=r"row length 65 exceeds n_positions 64"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match=r"row length 17 exceeds the cache's capacity 16"):
        model(torch.zeros(1, 17, dtype=torch.int64), cache=empty_cache(SMALL, rows=1, capacity=16))


def test_initialisation_is_gpt2s() -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=512, n_positions=128, n_embd=256, n_layer=2, n_head=4))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "ln_" in name:
            assert (parameter == 1).all()
        else:
            std = 0.02 / math.sqrt(4) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.02), name


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = random_model()
        model.checkpointing = checkpointing
        model(torch.arange(10)[None]).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=4, dropout=0.5))
    tokens = torch.arange(10)[None]
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_logits_are_float32_and_not_rounded_under_autocast() -> None:
    model = random_model()
    hidden = torch.randn(2, 3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.logits(hidden)
        assert model.h[0].attn.c_attn(hidden).dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert torch.equal(logits, hidden @ model.wte.weight.t())
    assert model.to(torch.bfloat16).logits(hidden.bfloat16()).dtype == torch.float32


def test_presets_have_their_published_sizes() -> None:
    millions = {"small": 124.4, "medium": 354.8, "large": 774.0, "xl": 1557.6}
    for name, expected in millions.items():
        with torch.device("meta"):
            model = GPT2(preset(name, 50257), device="meta")
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(expected, abs=0.05)
    assert MODELS["gpt2"] is GPT2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, "n_head is 5; it must divide n_embd, which is 32"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, float], message: str) -> None:
    shape = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
    with pytest.raises(ValueError, match=message):
        GPT2Config(**(shape | changes))


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"preset is 'huge'; allowed are tiny, mini_xl"):
        preset("huge", 100)
