"""Models to and from Hugging Face folders: ``config.json`` and safetensors with GPT-2's own names and
transposition.

A policy is a ``GPT2LMHeadModel``; a reward model is a ``GPT2ForSequenceClassification`` with one label, its
normaliser in ``config.json`` as ``reward_gain`` and ``reward_bias``: score = reward_gain * logit +
reward_bias.  transformers opens both, and folders that transformers wrote open here, sharded or not.

Left out on purpose: pickled weights, downloads, and tokenizer files.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_ray.models.blank import blank
from rlhf_ray.models.gpt2 import GPT2, INIT_STD, GPT2Config
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.quantised import freeze
from rlhf_ray.rundir.fit import tensor_faults

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PREFIX = "transformer."
_TRANSPOSED = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")  # GPT-2's Conv1D keeps (in, out)
_BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$")  # causal masks that old transformers stored
# What transformers' GPT2Config allows and this model does not: such a folder would load wrongly.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def save_policy(model: GPT2, folder: Path | str, *, pad_id: int, bos_id: int, eos_id: int) -> None:
    """Write a ``GPT2LMHeadModel`` folder in the model's own dtype; the tied head is not repeated."""
    config = _config_json(model, "GPT2LMHeadModel", pad_id=pad_id, bos_id=bos_id, eos_id=eos_id)
    _write(Path(folder), config, _to_hf(model))


def read_config(folder: Path | str) -> GPT2Config:
    """The shape of the model in a folder, without its weights; ValueError when it is not a GPT-2's."""
    return _gpt2_config(_read_json(Path(folder) / CONFIG), Path(folder))


def load_policy(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    vocab_size: int | None = None,
    frozen: str = "float32",
) -> GPT2:
    """Read a language model, its embedding grown to ``vocab_size`` rows when it has fewer.

    One that is ``frozen`` in anything but float32 has its matrices packed as such (``models/quantised.py``).

    New rows start at the mean of the old ones (Hewitt 2021): no new token is likelier than an average old
    one. ValueError, naming what is wrong, for a folder that is not this model, or one with more than
    ``vocab_size`` rows.
    """
    config, state = _read_policy(Path(folder))
    model = _build(config, state, Path(folder), device=device, dtype=dtype, frozen=frozen)
    return model if vocab_size is None else _grow(model, vocab_size, Path(folder))


def policy_state(folder: Path) -> dict[str, Tensor]:
    """A language model's parameters by name, views of its mapped files; ValueError as of ``load_policy``."""
    config, state = _read_policy(folder)
    _check(state, blank(_gpt2_config(config, folder), torch.float32), folder)
    return state


def read_normaliser(model: ValueModel, folder: Path) -> None:
    """Give a reward model the normaliser that its folder's configuration holds."""
    _normalise(model, _read_json(folder / CONFIG))


def save_reward_model(model: ValueModel, folder: Path | str, *, pad_id: int, bos_id: int, eos_id: int) -> None:
    """Write a ``GPT2ForSequenceClassification`` folder; the score's bias is folded into ``reward_bias``."""
    trunk = model.trunk
    config = _config_json(trunk, "GPT2ForSequenceClassification", pad_id=pad_id, bos_id=bos_id, eos_id=eos_id)
    gain, bias = model.reward_gain.item(), model.reward_bias.item()
    config["num_labels"] = 1
    config["id2label"], config["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}
    config["reward_gain"], config["reward_bias"] = gain, gain * model.score.bias.item() + bias
    _write(Path(folder), config, _to_hf(trunk) | {"score.weight": model.score.weight.detach()})


def load_reward_model(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    frozen: str = "float32",
) -> ValueModel:
    """Read a reward model; a folder without a normaliser gets gain 1 and bias 0.

    The trunk of one that is ``frozen`` in anything but float32 is packed.

    ValueError, naming what is wrong, for a folder that is not a one-label GPT-2 classifier.
    """
    config, tensors = _read(Path(folder))
    state = _from_hf(tensors, Path(folder))
    score = state.pop("score.weight", None)
    if score is None:
        raise ValueError(f"{folder}: {WEIGHTS} lacks score.weight; this is not a reward model")
    trunk = _build(config, state, Path(folder), device=device, dtype=dtype, frozen=frozen)
    model = ValueModel(trunk)
    if score.shape != model.score.weight.shape:
        raise ValueError(f"{folder}: score.weight is {list(score.shape)}, expected {list(model.score.weight.shape)}")
    with torch.no_grad():
        model.score.weight.copy_(score)
    _normalise(model, config)
    return model


def _normalise(model: ValueModel, config: dict[str, Any]) -> None:
    model.reward_gain.fill_(config.get("reward_gain", 1.0))
    model.reward_bias.fill_(config.get("reward_bias", 0.0))


def _config_json(model: GPT2, architecture: str, *, pad_id: int, bos_id: int, eos_id: int) -> dict[str, Any]:
    config = model.config
    for name, value in (("pad_id", pad_id), ("bos_id", bos_id), ("eos_id", eos_id)):
        if not 0 <= value < config.vocab_size:
            raise ValueError(f"{name} is {value}; the model has {config.vocab_size} tokens")
    return {
        "architectures": [architecture],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": INIT_STD,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": True,
        "torch_dtype": str(model.wte.weight.dtype).removeprefix("torch."),
        "pad_token_id": pad_id,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }


def _to_hf(model: GPT2) -> dict[str, Tensor]:
    """Parameters under their names in a Hugging Face folder."""
    return {
        PREFIX + name: (p.detach().t() if _TRANSPOSED.search(name) else p.detach())
        for name, p in model.named_parameters()
    }


def _from_hf(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Views of the tensors under this model's names, transposed back; the head and the score keep theirs."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = name.removeprefix(PREFIX)
        if _BUFFERS.search(own):
            continue
        if own in state:
            raise ValueError(f"{folder}: {own} is there twice, with and without {PREFIX!r}")
        transposed = _TRANSPOSED.search(own) is not None and tensor.ndim == 2
        state[own] = tensor.t() if transposed else tensor
    return state


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read_policy(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A language model's configuration and parameters."""
    config, tensors = _read(folder)
    state = _from_hf(tensors, folder)
    head = state.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in state and not torch.equal(head, state["wte.weight"]):
        raise ValueError(f"{folder}: lm_head.weight differs from wte.weight; only a tied head can be loaded")
    return config, state


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The folder's configuration and tensors, every shard of them."""
    config = _read_json(folder / CONFIG)
    index = folder / f"{WEIGHTS}.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: a model folder has {CONFIG} and safetensors (no pickle is loaded)")
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return config, tensors


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: a model folder has {CONFIG} and {WEIGHTS}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def _gpt2_config(config: dict[str, Any], folder: Path) -> GPT2Config:
    for key, allowed in _FIXED.items():
        if key == "model_type" and key not in config:
            raise ValueError(f"{folder / CONFIG}: model_type is missing; it must be gpt2")
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{folder / CONFIG}: {key} is {config[key]!r}; it must be {allowed[0]!r}")
    missing = [k for k in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head") if k not in config]
    if missing:
        raise ValueError(f"{folder / CONFIG}: {', '.join(missing)} missing")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise ValueError(f"{folder / CONFIG}: n_inner is {config['n_inner']}; it must be 4 * n_embd or null")
    return GPT2Config(
        vocab_size=config["vocab_size"],
        n_positions=config["n_positions"],
        n_embd=config["n_embd"],
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        layer_norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
    )


def _build(
    config: dict[str, Any],
    state: dict[str, Tensor],
    folder: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    frozen: str,
) -> GPT2:
    """A model with the given parameters; dropout is off, as in everything but pre-training."""
    model = blank(_gpt2_config(config, folder), dtype)
    _check(state, model, folder)
    if frozen == "float32":
        state = {name: tensor.to(device=device, dtype=dtype).contiguous() for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    if frozen != "float32":
        assert dtype == torch.float32, f"frozen in {frozen}, computed in {dtype}"
        freeze(model, frozen, device)  # straight from the file, a matrix at a time
        for parameter in model.parameters():  # small ones, which as views would keep the file mapped
            parameter.data = parameter.data.clone()
    return model


def _check(state: dict[str, Tensor], model: GPT2, folder: Path) -> None:
    """ValueError naming the tensors that are not those of the model."""
    problems = tensor_faults(state, dict(model.named_parameters()))
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{folder}: the tensors don't fit {CONFIG}: {'; '.join(problems[:5])}{more}")


def _grow(model: GPT2, vocab_size: int, folder: Path) -> GPT2:
    """The model with vocab_size rows in its embedding."""
    old = model.wte.weight.detach()
    if vocab_size < len(old):
        raise ValueError(f"{folder}: its vocabulary has {len(old)} tokens, the tokenizer only {vocab_size}")
    if vocab_size == len(old):
        return model
    mean = old.float().mean(0, keepdim=True).to(old.dtype).expand(vocab_size - len(old), -1)
    state = model.state_dict() | {"wte.weight": torch.cat([old, mean])}
    grown = blank(replace(model.config, vocab_size=vocab_size), old.dtype)
    grown.load_state_dict(state, assign=True)
    return grown
