"""The configurations of every stage but PPO.

Paths are relative to the current folder or, failing that, to the repository.  ``policy: checkpoints/sft/default`` names
a run; its best (else newest) checkpoint is meant.  A model folder can be named directly too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.loader import Config, Section, merge, read_yaml
from rlhf_ray.config.lora import LoRA
from rlhf_ray.config.memory import Memory
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.presets import hardware_preset, preset_file
from rlhf_ray.config.run_fields import RunFields

Preset = Literal["tiny", "mini_xl", "small", "medium", "large", "xl"]
TemplateName = Literal["chat", "alpaca", "plain"]
DType = Literal["float32", "bfloat16"]
PRESET_STAGES = ("pretrain", "sft", "reward_model", "ppo", "evaluate")


class Optimiser(Section):
    """AdamW and its schedule."""

    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = Field(0.03, ge=0, le=0.1)
    """Share of the run's steps with a rising learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    """Applied to matrices, never to biases, norms and positions."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient clipping; 0 turns it off."""


class TrainConfig(RunFields):
    """What the Ray Train stages share."""

    cache: Path | None = Path("data/cache")
    """Folder that keeps tokenised rows for the next start; null tokenises every time."""
    num_workers: int = Field(0, ge=0)
    """Ray Train workers; 0 trains in this process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: DType = "float32"
    """Compute type; weights and optimiser stay float32."""
    compile: bool = False
    """Compile the model's blocks: slow to begin, then somewhat faster."""
    threads: int = Field(0, ge=0)
    """Torch threads of each worker; 0 divides the machine's cores among them."""
    epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(0, ge=0)
    """Optimiser steps; 0 lets epochs decide."""
    batch_size: int = Field(32, ge=1)
    """Rows of one optimiser step, over all workers."""
    micro_batch_size: int = Field(32, ge=1)
    """Rows of one forward pass of one worker."""
    micro_batch_tokens: int = Field(0, ge=0)
    """Instead, tokens of one forward pass, rows of like length together; 0 lets rows decide."""
    max_length: int = Field(256, ge=2)
    """Tokens of a row; longer rows are cut or dropped, and counted."""
    held_out: float = Field(0.02, ge=0, lt=1)
    """Share of the prompts kept for evaluation."""
    log_every: int = Field(10, ge=1)
    """Steps between two lines of metrics."""
    eval_every: int = Field(0, ge=0)
    """Steps between two evaluations; 0 evaluates at the end alone."""
    save_every: int = Field(0, ge=0)
    """Steps between two checkpoints; 0 saves at the end alone."""
    max_restarts: int = Field(2, ge=0)
    """Deaths of a worker to survive."""
    optimiser: Optimiser = Optimiser()
    memory: Memory = Memory()

    @model_validator(mode="after")
    def _nobody_sleeps(self) -> TrainConfig:
        if self.memory.sleep:
            raise ValueError("memory.sleep = True is for PPO, whose roles wait for each other; nobody is idle here")
        return self


class TokenizerConfig(Config):
    """Byte-level BPE training."""

    data: list[Path] = [Path("data/raw/pretrain_corpus.txt")]
    output: Path = Path("data/vocab")
    vocab_size: int = Field(4096, ge=256)
    """Bytes and merges; the seven special tokens come on top."""


class GrowConfig(Config):
    """An embedding grown by the special tokens."""

    policy: Path = Path("models/gpt2")
    """A GPT-2 without them."""
    output: Path = Path("checkpoints/pretrained/grown")
    seed: int = Field(0, ge=0)
    """Of the new rows."""


class PretrainConfig(TrainConfig):
    """Language modelling on raw text."""

    data: list[Path] = [Path("data/raw/pretrain_corpus.txt")]
    """Text files (.txt, .jsonl, .gz, .parquet)."""
    tokenizer: Path = Path("data/vocab")
    """Folder with vocab.json and merges.txt; trained first when it has none."""
    vocab_size: int = Field(4096, ge=256)
    """Size of a vocabulary that has to be trained first, without special tokens."""
    preset: Preset = "tiny"
    policy: Path | None = None
    """GPT-2 folder to go on from, instead of random weights."""
    max_tokens: int = Field(0, ge=0)
    """Tokens of the corpus to train on; 0 takes them all."""


class SFTConfig(TrainConfig):
    """Supervised fine-tuning on prompts and responses."""

    data: list[Path] = [Path("data/sft/sft_dataset.jsonl")]
    policy: Path = Path("checkpoints/pretrained/default")
    template: TemplateName = "chat"
    completion_only: bool = True
    """Only the assistant's tokens are targets."""
    packing: bool = True
    """Several rows in one sequence, attention blocked between them."""
    dropout: float = Field(0.0, ge=0, lt=1)
    lora: LoRA = LoRA()
    """Adapters to train instead of the weights."""


class RewardModelConfig(TrainConfig):
    """Bradley-Terry reward modelling on pairs."""

    data: list[Path] = [Path("data/preferences/pairs.jsonl")]
    policy: Path = Path("checkpoints/sft/default")
    """Where the backbone starts, and whose samples the reward is normalised on."""
    template: TemplateName = "chat"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    centre_coef: float = Field(0.0, ge=0)
    """Weight of the mean squared sum of a pair's scores."""
    normalise_samples: int = Field(512, ge=0)
    """Samples of the SFT policy to normalise the reward on; 0 leaves it raw."""
    prompts: Path | None = None
    """Prompts that those samples answer; unset takes those of the training pairs."""
    response_length: int = Field(48, ge=1)
    """Tokens of those samples, at most."""
    lora: LoRA = LoRA()
    """Adapters to train, with the score, instead of the weights."""


class EvaluateConfig(Config):
    """Before/after comparison of two policies on held-out prompts."""

    policy: Path = Path("checkpoints/ppo/default")
    baseline: Path = Path("checkpoints/sft/default")
    reward_model: Path | None = Path("checkpoints/reward_model/default")
    prompts: Path = Path("data/raw/prompts_heldout.txt")
    template: TemplateName | None = None
    """Unset takes the one that the policy was trained with."""
    judge: str = "demo"
    """demo (the shipped world's rules), none, or path/to/file.py:function(prompt, response, **fields)."""
    response_length: int = Field(48, ge=1)
    temperature: float = Field(1.0, ge=0)
    max_prompts: int = Field(256, ge=1)
    prompt_length: int = Field(128, ge=1)
    """Longer prompts are cut from the left."""
    examples: int = Field(8, ge=0)
    """Sample pairs to print."""
    perplexity: list[Path] = []
    """Measure the perplexity of these texts or dialogues, instead of comparing samples."""
    batch_size: int = Field(64, ge=1)
    """Rows generated or scored at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(0, ge=0)
    output: Path | None = None
    """JSON file for the table."""


class ChatConfig(Config):
    """A conversation in the terminal."""

    policy: Path = Path("checkpoints/ppo/default")
    compare: list[Path] = []
    """Two checkpoints to answer side by side."""
    system: str = ""
    """The system turn, never dropped."""
    template: TemplateName | None = None
    """Unset takes the one that the policy was trained with."""
    temperature: float = Field(0.7, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_new_tokens: int = Field(128, ge=1)
    """Tokens of an answer, at most; the rest of the context is for the conversation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(0, ge=0)


class MonitorConfig(Config):
    """Prometheus and its pages."""

    address: str = "127.0.0.1:9090"
    """Where Prometheus listens; it asks nobody for a password."""
    folder: Path = Path("checkpoints/monitor")
    """Where it keeps its configuration and what it has seen."""
    retention: str = "30d"
    """How long it keeps that."""
    grafana: Path | None = None
    """Write the dashboard for Grafana to this file, and do nothing else."""
    session: Path = Path("/tmp/ray/session_latest")
    """The Ray session to watch, or the link to the newest one."""


class PipelineConfig(Config):
    """Every stage in order; ``run`` and ``seed`` of the top level go to each."""

    preset: str = "auto"
    """Each stage starts from configs/<stage>/<preset>.yaml; auto takes the one that fits this machine."""
    run: str = Field("default", min_length=1, pattern=r"^[\w.-]+$")
    seed: int = Field(0, ge=0)
    checkpoints: Path = Path("checkpoints")
    """Folder that holds every stage's runs."""
    policy: Path | None = None
    """Start from this pre-trained GPT-2 folder or run, without a tokenizer and a pre-training of its own."""
    force: bool = False
    """Run every stage although its output is complete and its configuration unchanged."""
    until: Literal["tokenizer", "pretrain", "sft", "reward_model", "ppo", "evaluate"] = "evaluate"
    """Last stage to run."""
    pretrain: PretrainConfig = PretrainConfig()
    sft: SFTConfig = SFTConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    ppo: PPOConfig = PPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="before")
    @classmethod
    def _under_the_preset(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Lay every stage's preset under the values given for it."""
        name = values.get("preset", "auto")
        preset = hardware_preset() if name == "auto" else name
        files = {stage: preset_file(stage, preset) for stage in PRESET_STAGES}
        if not any(file.is_file() for file in files.values()):
            raise ValueError(f"preset = {name!r}: there is no configs/<stage>/{name}.yaml; take tiny or mini_xl")
        base = {stage: read_yaml(file) for stage, file in files.items() if file.is_file()}
        return {**merge(base, values), "preset": preset}
