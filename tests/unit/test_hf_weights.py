"""Model folders in both directions with transformers, growth, refusals, and the flat buffer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config as PeerConfig
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model

from rlhf_ray.models import GPT2, GPT2Config, ValueModel
from rlhf_ray.models.flat import flat_weights, load_flat_weights
from rlhf_ray.models.hf_weights import (
    load_policy,
    load_reward_model,
    read_config,
    save_policy,
    save_reward_model,
)

CONFIG = GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4)
IDS = {"pad_id": 90, "bos_id": 91, "eos_id": 92}
TOKENS = torch.arange(24).view(2, 12) * 3 % 90


def random_model(config: GPT2Config = CONFIG) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def peer_config(**changes: Any) -> PeerConfig:
    shape = {"vocab_size": 97, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return PeerConfig(**(shape | changes), pad_token_id=90, bos_token_id=91, eos_token_id=92)


def same_parameters(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_saved_policy_opens_in_transformers_and_here(tmp_path: Path) -> None:
    own = random_model()
    save_policy(own, tmp_path, **IDS)
    peer, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(peer(TOKENS).logits, own.logits(own(TOKENS)), atol=1e-4, rtol=0)
    assert (peer.config.pad_token_id, peer.config.bos_token_id, peer.config.eos_token_id) == (90, 91, 92)
    again = load_policy(tmp_path)
    assert same_parameters(again, own)
    assert again.config == own.config == read_config(tmp_path)
    assert all(p.requires_grad for p in again.parameters())


def test_a_reward_model_gives_transformers_score_after_the_normaliser(tmp_path: Path) -> None:
    own = ValueModel(random_model())
    own.set_normaliser(mean=0.7, std=0.4)
    with torch.no_grad():
        own.score.bias.fill_(0.2)
    save_reward_model(own, tmp_path, **IDS)
    tokens = TOKENS.clone()
    tokens[1, 8:] = 90
    scores = own(tokens, tokens != 90)
    peer, report = GPT2ForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    config = json.loads((tmp_path / "config.json").read_text())
    with torch.no_grad():
        logit = peer(tokens, attention_mask=tokens != 90).logits[:, 0]
    torch.testing.assert_close(config["reward_gain"] * logit + config["reward_bias"], scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(load_reward_model(tmp_path)(tokens, tokens != 90), scores, atol=1e-6, rtol=0)


def test_a_reward_model_of_transformers_loads_here(tmp_path: Path) -> None:
    peer = GPT2ForSequenceClassification(peer_config(num_labels=1)).eval()
    peer.save_pretrained(tmp_path)
    own = load_reward_model(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(own(TOKENS, torch.ones_like(TOKENS)), peer(TOKENS).logits[:, 0], atol=1e-4, rtol=0)


def test_every_form_of_a_base_folder_loads(tmp_path: Path) -> None:
    peer = GPT2LMHeadModel(peer_config()).eval()
    folder = tmp_path / "whole"
    peer.save_pretrained(folder)
    reference = load_policy(folder)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    buffers = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)}
    head = {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
    for form in (bare, bare | buffers, tensors | head):
        save_file(form, folder / "model.safetensors")
        assert same_parameters(load_policy(folder), reference)
    with torch.no_grad():
        torch.testing.assert_close(reference.logits(reference(TOKENS)), peer(TOKENS).logits, atol=1e-4, rtol=0)
    GPT2Model(peer_config()).save_pretrained(tmp_path / "trunk")
    assert load_policy(tmp_path / "trunk").config == CONFIG
    peer.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert same_parameters(load_policy(tmp_path / "shards"), reference)


def test_a_vocabulary_grows_by_rows_at_the_mean(tmp_path: Path) -> None:
    own = random_model()
    save_policy(own, tmp_path, **IDS)
    grown = load_policy(tmp_path, vocab_size=104)
    assert grown.config.vocab_size == 104
    weight = grown.wte.weight.detach()
    assert torch.equal(weight[:97], own.wte.weight)
    torch.testing.assert_close(weight[97:], own.wte.weight.detach().mean(0).expand(7, -1))
    assert torch.equal(grown(TOKENS), own(TOKENS))
    assert same_parameters(load_policy(tmp_path, vocab_size=97), own)
    with pytest.raises(ValueError, match="vocabulary has 97 tokens, the tokenizer only 96"):
        load_policy(tmp_path, vocab_size=96)


def test_bfloat16_survives_a_round_trip(tmp_path: Path) -> None:
    own = random_model().to(torch.bfloat16)
    save_policy(own, tmp_path, **IDS)
    again = load_policy(tmp_path, dtype=torch.bfloat16)
    assert again.wte.weight.dtype == torch.bfloat16
    assert same_parameters(again, own)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer.ln_f.bias": None}, "ln_f.bias is missing"),
        ({"transformer.extra": torch.zeros(1)}, "extra is unknown"),
        ({"transformer.wpe.weight": torch.zeros(16, 32)}, r"wpe.weight is \[16, 32\], expected \[32, 32\]"),
        ({"transformer.h.0.attn.c_attn.weight": torch.zeros(96, 32)}, r"c_attn.weight is \[32, 96\], expected"),
        ({"wte.weight": torch.zeros(97, 32)}, "wte.weight is there twice"),
        ({"lm_head.weight": torch.zeros(97, 32)}, "lm_head.weight differs from wte.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    save_policy(random_model(), tmp_path, **IDS)
    rewrite(tmp_path, changes)
    with pytest.raises(ValueError, match=message):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; it must be 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"n_inner": 100}, "n_inner is 100"),
        ({"n_layer": 3}, r"h\.2\..* is missing.* and 7 more"),
    ],
)
def test_configurations_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_policy(random_model(), tmp_path, **IDS)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_policy(tmp_path)


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_policy(tmp_path)
    save_policy(random_model(), tmp_path, **IDS)
    with pytest.raises(ValueError, match=r"lacks score\.weight"):
        load_reward_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_policy(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing.*no pickle is loaded"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_policy(tmp_path)


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    GPT2ForSequenceClassification(peer_config(num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"score.weight is \[3, 32\], expected \[1, 32\]"):
        load_reward_model(tmp_path)


def test_special_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eos_id is 97; the model has 97 tokens"):
        save_policy(random_model(), tmp_path / "new", pad_id=0, bos_id=1, eos_id=97)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_weights_round_trip_and_hold_a_tied_weight_once(dtype: torch.dtype) -> None:
    source, target = random_model().to(dtype), GPT2(CONFIG, dtype=dtype)
    buffer = flat_weights(source)
    assert buffer.shape == (sum(p.numel() for p in source.parameters()),)
    assert buffer.dtype == (np.float32 if dtype == torch.float32 else np.int16)
    buffer.flags.writeable = False  # as it arrives from shared memory
    load_flat_weights(target, buffer)
    assert same_parameters(source, target)


def test_flat_weights_that_do_not_fit_are_refused() -> None:
    model = random_model()
    buffer = flat_weights(model)
    with pytest.raises(ValueError, match="the model takes float32"):
        load_flat_weights(model, buffer[:-1])
    with pytest.raises(ValueError, match="the model takes float32"):
        load_flat_weights(model, buffer.view(np.int32))
    model.wpe.to(torch.bfloat16)
    with pytest.raises(ValueError, match="exactly one float type"):
        flat_weights(model)
