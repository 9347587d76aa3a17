"""Model folders small enough to be made anew in every test."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from rlhf_ray.models import GPT2, GPT2Config, ValueModel
from rlhf_ray.models.hf_weights import save_policy, save_reward_model
from rlhf_ray.tokenizer import Tokenizer, train_bpe, write_hf_tokenizer

LINES = ("What is the capital of the valley?", "The capital is Oster, of course.", "Thank you very much!")


@cache
def small_tokenizer(vocab_size: int = 280) -> Tokenizer:
    """A tokenizer trained on a few lines."""
    return train_bpe(LINES * 4, vocab_size)


def small_model(vocab_size: int, *, seed: int = 0, n_positions: int = 64) -> GPT2:
    """A random model, its weights large enough for uneven distributions."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=vocab_size, n_positions=n_positions, n_embd=16, n_layer=2, n_head=2)
    model = GPT2(config, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def make_policy(
    folder: Path,
    *,
    seed: int = 0,
    n_positions: int = 64,
    template: str = "chat",
    endless: bool = False,
) -> Path:
    """A policy's folder with its tokenizer; an endless one never says a special token."""
    tokenizer = small_tokenizer()
    model = small_model(tokenizer.vocab_size, seed=seed, n_positions=n_positions)
    if endless:
        with torch.no_grad():
            model.ln_f.bias.add_(1.0)
            model.wte.weight[tokenizer.base_size :] = -3.0  # the state now points away from these
    ids = {"pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    save_policy(model, folder, **ids)
    write_hf_tokenizer(folder, tokenizer, template)
    return folder


def make_reward_model(folder: Path, *, seed: int = 9) -> Path:
    """A reward model's folder with the same tokenizer."""
    tokenizer = small_tokenizer()
    model = ValueModel(small_model(tokenizer.vocab_size, seed=seed))
    ids = {"pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    save_reward_model(model, folder, **ids)
    write_hf_tokenizer(folder, tokenizer, "chat")
    return folder
