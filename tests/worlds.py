"""A very small world for tests: a vocabulary, a random policy, a reward model and prompts, all in one folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.algorithms.ppo import credit
from rlhf_ray.config import LoRA, PPOConfig, SFTConfig
from rlhf_ray.crews import worker_arguments
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.models.adapter_folders import ADAPTER, Base, save_adapter, save_bases
from rlhf_ray.models.gpt2 import GPT2, GPT2Config
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.hf_weights import load_policy, save_policy, save_reward_model
from rlhf_ray.models.lora import merged, with_adapters
from rlhf_ray.ppo_inputs import read_inputs
from rlhf_ray.tokenizer import Tokenizer, train_bpe, write_hf_tokenizer
from rlhf_ray.types import Experience, Judged, Rollout
from rlhf_ray.workers.learner import LearnerWorker
from rlhf_ray.workers.reference import ReferenceWorker
from rlhf_ray.workers.reward import RewardWorker
from rlhf_ray.workers.rollout import RolloutWorker

LINES = ["the cat sat on the mat", "a dog ran to the river", "we like green apples and red pears"] * 3


def make_world(folder: Path, *, eos_logit: float = 3.8) -> Tokenizer:
    """Write ``policy/``, ``reward/`` and ``prompts.jsonl`` below the folder; about one token in ten is an EOS."""
    tokenizer = train_bpe(LINES, 280)
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    special = {name: getattr(tokenizer, name) for name in ("pad_id", "bos_id", "eos_id")}
    policy = GPT2(shape)
    with torch.no_grad():
        policy.wte.weight.mul_(5.0)  # peaked enough that samples differ in likelihood
        policy.ln_f.weight[0], policy.ln_f.bias[0] = 0.0, 1.0  # and one constant, which only the EOS listens to:
        policy.wte.weight[:, 0] = 0.0
        policy.wte.weight[tokenizer.eos_id, 0] = eos_logit
    save_policy(policy, folder / "policy", **special)
    write_hf_tokenizer(folder / "policy", tokenizer, "chat")
    save_reward_model(ValueModel(GPT2(shape)), folder / "reward", **special)
    write_hf_tokenizer(folder / "reward", tokenizer, "chat")
    rows = [{"prompt": f"{line} {i}", "number": i} for i, line in enumerate(LINES)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tokenizer


def adapt_reward(folder: Path) -> None:
    """Have ``reward/`` be a reward model that was trained as adapters over ``policy/``."""
    base, lora, tokenizer = Base.of(folder / "policy"), LoRA(rank=2), Tokenizer.load(folder / "reward")
    model = ValueModel(with_adapters(load_policy(folder / "policy"), lora, seed=3))
    stir(model.trunk.h)
    special = {name: getattr(tokenizer, name) for name in ("pad_id", "bos_id", "eos_id")}
    save_reward_model(merged(model), folder / "reward", **special)
    save_adapter(model, folder / "reward" / ADAPTER, lora, base)
    save_bases(folder / "reward", {"policy": base})


def ppo_config(folder: Path, **changes: Any) -> PPOConfig:
    """A PPO run of a few seconds in that world; a dictionary among the changes is merged into its section."""
    values: dict[str, Any] = {
        "checkpoints": folder / "checkpoints",
        "policy": folder / "policy",
        "rewards": [{"kind": "model", "source": str(folder / "reward")}],
        "prompts": folder / "prompts.jsonl",
        "num_rollout_workers": 0,
        "learner_threads": 1,
        "batch_size": 12,
        "total_steps": 3,
        "save_every": 1,
        "probes": 0,
        "report": False,
        "device": "cpu",
        "generation": {"response_length": 10, "prompt_length": 40, "shard_size": 5},
        "ppo": {"mini_batch_size": 6, "micro_batch_size": 4, "epochs": 2, "lr": 1e-3},
    }
    for name, value in changes.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return PPOConfig(**values)


@dataclass
class Workers:
    """The four real workers of a configuration, all with the first policy."""

    config: PPOConfig
    rollout: RolloutWorker
    reward: RewardWorker
    reference: ReferenceWorker | LearnerWorker
    learner: LearnerWorker

    @classmethod
    def build(cls, config: PPOConfig) -> Workers:
        arguments = worker_arguments(config, read_inputs(config))
        made = {kind: kind(**arguments[kind]) for kind in arguments}
        learner = made[LearnerWorker]
        workers = cls(config, made[RolloutWorker], made[RewardWorker], made.get(ReferenceWorker, learner), learner)
        workers.rollout.update_weights(workers.learner.weights(0))
        return workers

    def generate(self) -> Rollout:
        """The rows of step 0."""
        config = self.config
        stream = PromptStream(len(self.rollout.prompts), config.batch_size, seed=config.seed)
        return self.rollout.generate(stream.take(0), self.rollout.policy_version)

    def judge(self, rollout: Rollout) -> Judged:
        """Every worker's opinion on them."""
        return Judged(
            rollout=rollout,
            scores=self.reward.score(rollout),
            ref_logprobs=self.reference.logprobs(rollout),
            evaluation=self.learner.evaluate(rollout),
        )

    def experience(self) -> Experience:
        """What the learner learns from in step 0."""
        return credit(self.config.ppo, self.judge(self.generate()), self.config.kl.coef)[0]


def policy_weights(workers: Workers) -> torch.Tensor:
    """Every parameter of the learner's policy in one vector."""
    return torch.cat([p.detach().flatten().clone() for p in workers.learner.model.policy.parameters()])


def stir(module: torch.nn.Module, *, scale: float = 0.02) -> None:
    """Move every parameter that learns a little, the same way each time."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in filter(lambda x: x.requires_grad, module.parameters()):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def write_chats(folder: Path, count: int) -> None:
    """Write ``chats.jsonl``, rows of one short answer each."""
    rows = [{"prompt": f"Where is {i}?", "response": f"In the valley {i * i}."} for i in range(count)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def chats_config(folder: Path, **changes: Any) -> SFTConfig:
    """SFT of ``policy/`` on ``chats.jsonl``, in the folder that has both."""
    settings: dict[str, Any] = {
        "data": [folder / "chats.jsonl"],
        "policy": folder / "policy",
        "checkpoints": folder / "checkpoints",
        "cache": folder / "cache",
        "max_length": 64,
        "held_out": 0.2,
        "packing": False,
        "batch_size": 6,
        "threads": 1,
        "device": "cpu",
        "report": False,
    }
    return SFTConfig(**(settings | changes))
