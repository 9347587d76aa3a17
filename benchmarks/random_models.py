"""Models of every size with random weights and a known chance of EOS, in folders that transformers opens too.

One coordinate of the last hidden state is constant and only the EOS listens to it, so the EOS has the same
probability at every step: zero for responses of full length, 1/40 for geometric lengths of mean 40.  The vocabulary is
made up of bytes and pairs of bytes, so that a text of single letters has as many tokens as letters.
"""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import side_by_side  # noqa: F401  puts the repository on the path
import torch
import yaml
from machine import device

from rlhf_ray.generation import Engine, make_engine
from rlhf_ray.models import GPT2, PRESETS, ValueModel, preset
from rlhf_ray.models.gpt2 import INIT_STD
from rlhf_ray.models.hf_weights import save_policy, save_reward_model
from rlhf_ray.tokenizer import TEMPLATES, Tokenizer, write_hf_tokenizer
from rlhf_ray.tokenizer.vocabulary import BASE_TOKENS, Vocabulary
from rlhf_ray.types import Message

SIZES = tuple(name for name in PRESETS if name in ("tiny", "mini_xl", "small"))
VOCABULARIES = {"tiny": 4103, **dict.fromkeys(("mini_xl", "small", "medium", "large", "xl"), 50264)}
"""Tokens with the special ones, as the shipped configurations have them."""
NEVER = -40.0
"""An EOS logit that is never drawn."""


def eos_logit(probability: float, vocab_size: int, width: int) -> float:
    """The constant logit that gives the EOS this probability beside random ones of the model's spread."""
    others = math.log(vocab_size - 1) + INIT_STD**2 * (width - 1) / 2
    return math.log(probability / (1 - probability)) + others


def random_policy(size: str, *, eos: float = 0.0, seed: int = 0) -> GPT2:
    """A model that says EOS with this probability at every step."""
    torch.manual_seed(seed)
    config = preset(size, VOCABULARIES[size])
    model = GPT2(config)
    with torch.no_grad():
        model.ln_f.weight[0], model.ln_f.bias[0] = 0.0, 1.0
        model.wte.weight[:, 0] = 0.0
        logit = eos_logit(eos, config.vocab_size, config.n_embd) if eos else NEVER
        model.wte.weight[eos_id(size), 0] = logit
    return model.eval().requires_grad_(False)


def eos_id(size: str) -> int:
    """The EOS: third of the seven special tokens that end the vocabulary."""
    return VOCABULARIES[size] - 5


def pad_id(size: str) -> int:
    """The padding token: first of the special tokens."""
    return VOCABULARIES[size] - 7


def made_up_tokenizer(vocab_size: int) -> Tokenizer:
    """Bytes, and as many pairs of them as the vocabulary has room for, those of a blank and a letter first."""
    ids = {token: i for i, token in enumerate(BASE_TOKENS)}
    letters = [ids[bytes([byte])] for byte in b"abcdefghijklmnopqrstuvwxyz"]
    first = [(ids[b" "], letter) for letter in letters]
    rest = (pair for pair in itertools.product(range(256), range(256)) if pair not in first)
    merges = tuple(itertools.islice(itertools.chain(first, rest), vocab_size - 256 - 7))
    tokens = (*BASE_TOKENS, *(BASE_TOKENS[a] + BASE_TOKENS[b] for a, b in merges))
    return Tokenizer(Vocabulary(tokens=tokens, merges=merges))


def write_models(folder: Path, size: str) -> None:
    """Write ``policy/``, which never says EOS, and ``reward/``, of one size, with a vocabulary."""
    tokenizer = made_up_tokenizer(VOCABULARIES[size])
    special = {name: getattr(tokenizer, name) for name in ("pad_id", "bos_id", "eos_id")}
    assert (tokenizer.eos_id, tokenizer.pad_id) == (eos_id(size), pad_id(size))
    save_policy(random_policy(size), folder / "policy", **special)
    torch.manual_seed(1)
    save_reward_model(ValueModel(GPT2(preset(size, VOCABULARIES[size]))), folder / "reward", **special)
    for name in ("policy", "reward"):
        write_hf_tokenizer(folder / name, tokenizer, "plain")


def write_prompts(file: Path, size: str, *, count: int, length: int) -> None:
    """Write texts, one a line, that have exactly ``length`` tokens each under the plain template."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=length - 1)) for _ in range(count)]
    tokenizer = made_up_tokenizer(VOCABULARIES[size])
    assert len(TEMPLATES["plain"].prompt_ids(tokenizer, [Message(role="user", content=lines[0])])) == length
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_world(folder: Path, size: str, *, prompts: int, length: int, **settings: Any) -> Path:
    """Write models, prompts and PPO's configuration with these settings beside; returns the configuration's file."""
    write_models(folder, size)
    write_prompts(folder / "prompts.txt", size, count=prompts, length=length)
    config = {
        "checkpoints": str(folder / "checkpoints"),
        "policy": str(folder / "policy"),
        "rewards": [{"kind": "model", "source": str(folder / "reward")}],
        "prompts": str(folder / "prompts.txt"),
        "template": "plain",
        "learner_threads": 1,
        **settings,
    }
    file = folder / "ppo.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def random_engine(
    size: str, *, max_rows: int, dtype: torch.dtype = torch.float32, eos: float = 0.0, kind: str = "auto"
) -> Engine:
    """An engine on the device, with a model that says EOS with this probability at every step."""
    model = random_policy(size, eos=eos).to(device(), dtype)
    return make_engine(model, eos_id=eos_id(size), pad_id=pad_id(size), max_rows=max_rows, kind=kind)


def random_prompts(size: str, *, count: int, length: int) -> list[list[int]]:
    """Token ids, none of them special."""
    draw = random.Random(0)
    return [[draw.randrange(VOCABULARIES[size] - 7) for _ in range(length)] for _ in range(count)]
