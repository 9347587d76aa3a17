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
from rlhf_ray.data.lint import Ruler
from rlhf_ray.data.lint_report import brief
from rlhf_ray.models.folders import model_folder
from rlhf_ray.report import report_run
from rlhf_ray.runtime.train import is_complete, train
from rlhf_ray.runtime.train_job import make_job
from rlhf_ray.tokenizer import Tokenizer, find_template, train_bpe

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


def _train(objective: str, config: TrainConfig) -> Path:
    """Train, and write the run's report."""
    folder = train(objective, config)
    if config.report:
        report_run(folder, console.say)
    return folder


def pretrain(config: PretrainConfig) -> Path:
    """Pre-train a policy; a missing tokenizer is trained first, on the same text."""
    if not has_tokenizer(config.tokenizer):
        console.say(f"{config.tokenizer} holds no tokenizer yet: training it first")
        train_tokenizer(TokenizerConfig(data=config.data, output=config.tokenizer, vocab_size=config.vocab_size))
    _lint(config, "text", repository_path(config.tokenizer), "plain")
    return _train("language_model", config)


def sft(config: SFTConfig) -> Path:
    """Fine-tune a pre-trained policy on conversations."""
    _lint(config, "chats", model_folder(config.policy), config.template)
    return _train("sft", config)


def reward_model(config: RewardModelConfig) -> Path:
    """Train a reward model on pairs, from the SFT policy."""
    _lint(config, "pairs", model_folder(config.policy), config.template)
    return _train("reward_model", config)


def _lint(config: PretrainConfig | SFTConfig | RewardModelConfig, kind: str, tokenizer: Path, template: str) -> None:
    """Say in a line or two a file what the stage is about to read."""
    limit = 0 if kind == "text" else config.max_length
    ruler = Ruler(tokenizer=Tokenizer.load(tokenizer), template=find_template(template), limit=limit)
    brief([repository_path(path) for path in config.data], kind, ruler, console.say)


def complete(config: TrainConfig) -> bool:
    """Whether a stage is done already: same configuration, same inputs, last step reached and reported.

    False too when its inputs are not there yet.
    """
    try:
        job = make_job(OBJECTIVE_OF[type(config)], config)
    except ValueError:
        return False
    return is_complete(job)
