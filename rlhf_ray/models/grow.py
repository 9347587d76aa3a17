"""A policy with rows for the special tokens in its embedding, for adapters to be trained on.

Training every weight grows an embedding by itself, from the mean of its rows (``hf_weights.py``).  Adapters leave the
embedding alone, so its new rows must differ from the start, or no adapter could tell one special token from another:
each is drawn around the mean as the old rows are spread, column by column (Hewitt 2021, without covariances).
"""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_ray.config import GrowConfig, repository_path
from rlhf_ray.models.folders import model_folder
from rlhf_ray.models.hf_weights import load_policy, read_config, save_policy
from rlhf_ray.tokenizer import Tokenizer, write_hf_tokenizer


def grow(config: GrowConfig) -> Path:
    """Write the grown policy with its tokenizer, and return its folder; ValueError when there is nothing to grow."""
    folder, output = model_folder(config.policy), repository_path(config.output)
    tokenizer, rows = Tokenizer.load(folder), read_config(folder).vocab_size
    if rows == tokenizer.vocab_size:
        raise ValueError(f"policy = {config.policy}: its embedding has a row for every special token already")
    if (output / "config.json").exists():
        raise ValueError(f"output = {config.output}: there is a model already; name another folder")
    policy = load_policy(folder, vocab_size=tokenizer.vocab_size)
    embedding = policy.wte.weight.detach()
    noise = torch.randn(len(embedding) - rows, embedding.shape[1], generator=torch.Generator().manual_seed(config.seed))
    embedding[rows:] += noise * embedding[:rows].std(0)
    save_policy(policy, output, pad_id=tokenizer.pad_id, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    write_hf_tokenizer(output, tokenizer, "plain")
    return output
