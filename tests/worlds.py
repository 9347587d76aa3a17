"""A very small world for tests: a vocabulary, a random policy, a reward model and prompts, all in one folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rlhf_ray.config import PPOConfig
from rlhf_ray.models.gpt2 import GPT2, GPT2Config
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.hf_weights import save_policy, save_reward_model
from rlhf_ray.tokenizer import Tokenizer, train_bpe, write_hf_tokenizer

LINES = ["the cat sat on the mat", "a dog ran to the river", "we like green apples and red pears"] * 3


def make_world(folder: Path) -> Tokenizer:
    """Write ``policy/``, ``reward/`` and ``prompts.jsonl`` below the folder."""
    tokenizer = train_bpe(LINES, 280)
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    special = {name: getattr(tokenizer, name) for name in ("pad_id", "bos_id", "eos_id")}
    policy = GPT2(shape)
    with torch.no_grad():  # peaked enough that samples differ in likelihood
        policy.wte.weight.mul_(5.0)
    save_policy(policy, folder / "policy", **special)
    write_hf_tokenizer(folder / "policy", tokenizer, "chat")
    save_reward_model(ValueModel(GPT2(shape)), folder / "reward", **special)
    write_hf_tokenizer(folder / "reward", tokenizer, "chat")
    rows = [{"prompt": f"{line} {i}", "number": i} for i, line in enumerate(LINES)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tokenizer


def ppo_config(folder: Path, **changes: object) -> PPOConfig:
    """A PPO run of a few seconds in that world."""
    values: dict[str, object] = {
        "checkpoints": folder / "checkpoints",
        "policy": folder / "policy",
        "rewards": [{"kind": "model", "source": str(folder / "reward")}],
        "prompts": folder / "prompts.jsonl",
        "num_rollout_workers": 0,
        "learner_threads": 1,
        "batch_size": 12,
        "total_steps": 3,
        "save_every": 1,
        "device": "cpu",
        "generation": {"response_length": 10, "prompt_length": 40, "shard_size": 5},
        "ppo": {"mini_batch_size": 6, "micro_batch_size": 4, "epochs": 2, "lr": 1e-3},
    }
    return PPOConfig(**{**values, **changes})
