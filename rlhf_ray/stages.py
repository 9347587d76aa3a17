"""The Ray Train stages as functions: a configuration in, a model's folder out.

Left out on purpose: the order of stages, which the pipeline knows.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_ray import console
from rlhf_ray.config import (
    PretrainConfig,
    RewardModelConfig,
    SFTConfig,
    TokenizerConfig,
    TrainConfig,
    repository_path,
)
from rlhf_ray.data import read_text
from rlhf_ray.runtime.train import is_complete, train
from rlhf_ray.runtime.train_job import make_job
from rlhf_ray.tokenizer import train_bpe

OBJECTIVE_OF: dict[type[TrainConfig], str] = {
    PretrainConfig: "language_model",
    SFTConfig: "sft",
    RewardModelConfig: "reward_model",
}


def train_tokenizer(config: TokenizerConfig) -> Path:
    """Learn a vocabulary and write it down; ValueError when the text is missing or too short for its size."""
    folder = repository_path(config.output)
    console.say(f"training a tokenizer of {config.vocab_size:,} tokens for {folder}")
    texts = [row.text for path in config.data for row in read_text(repository_path(path))]
    with console.Progress("tokenizer", config.vocab_size - 256) as progress:
        tokenizer = train_bpe(texts, config.vocab_size, on_progress=lambda done, total: progress.update(done))
    tokenizer.save(folder)
    return folder


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary."""
    folder = repository_path(folder)
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()


def pretrain(config: PretrainConfig) -> Path:
    """Pre-train a policy; a missing tokenizer is trained first, on the same text."""
    if not has_tokenizer(config.tokenizer):
        console.say(f"{config.tokenizer} holds no tokenizer yet: training it first")
        train_tokenizer(TokenizerConfig(data=config.data, output=config.tokenizer, vocab_size=config.vocab_size))
    return train("language_model", config)


def sft(config: SFTConfig) -> Path:
    """Fine-tune a pre-trained policy on conversations."""
    return train("sft", config)


def reward_model(config: RewardModelConfig) -> Path:
    """Train a reward model on pairs, from the SFT policy."""
    return train("reward_model", config)


def complete(config: TrainConfig) -> bool:
    """Whether a stage is done already: same configuration, same inputs, last step reached and reported.

    False too when its inputs are not there yet.
    """
    try:
        job = make_job(OBJECTIVE_OF[type(config)], config)
    except ValueError:
        return False
    return is_complete(job)
