"""A policy and the tokenizer that belongs to it, from one folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rlhf_ray.models.folders import model_folder
from rlhf_ray.models.gpt2 import GPT2
from rlhf_ray.models.hf_weights import load_policy
from rlhf_ray.tokenizer import TEMPLATES, Tokenizer


def find_device(name: str) -> torch.device:
    """The device of a configuration: cpu, cuda, or auto for cuda where there is any.

    Raises ValueError when cuda is asked for and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = cuda: torch sees no CUDA device here; take auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def recorded_template(folder: Path) -> str | None:
    """The template that a model folder's tokenizer_config.json holds; None when it holds none of ours."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    try:
        jinja = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not a JSON object ({error}); copy the file again") from error
    return next((name for name, template in TEMPLATES.items() if template.jinja == jinja), None)


def load_policy_with_tokenizer(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    field: str = "policy",
) -> tuple[GPT2, Tokenizer, str | None]:
    """The policy of a folder or run, ready for inference, its tokenizer, and its template's name if recorded.

    Raises ValueError naming the field when there is no model or the vocabulary does not fit it.
    """
    folder = model_folder(path, field=field)
    tokenizer = Tokenizer.load(folder)
    model = load_policy(folder, device=device, dtype=dtype)
    if model.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{field} = {path}: the model has {model.config.vocab_size} tokens, but its vocabulary with the "
            f"special tokens has {tokenizer.vocab_size}; copy the vocab.json and merges.txt that it was "
            "trained with, or fine-tune it first"
        )
    return model.eval().requires_grad_(False), tokenizer, recorded_template(folder)
