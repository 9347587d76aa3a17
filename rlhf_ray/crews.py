"""The workers of a PPO run: what each is built with, and where it runs."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from rlhf_ray.config import PPOConfig
from rlhf_ray.generation.sampling import Sampling
from rlhf_ray.models.scoring import compute_type
from rlhf_ray.ppo_inputs import Inputs, row_length
from rlhf_ray.rewards import RewardContext
from rlhf_ray.runtime.cluster import connect
from rlhf_ray.runtime.crew import RayCrew, wait_until_built
from rlhf_ray.startup import StartUp
from rlhf_ray.workers.groups import Crew, LocalCrew
from rlhf_ray.workers.learner import LearnerWorker
from rlhf_ray.workers.policy_critic import build_policy_critic
from rlhf_ray.workers.reference import ReferenceWorker
from rlhf_ray.workers.reward import RewardWorker
from rlhf_ray.workers.rollout import RolloutWorker

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def worker_arguments(config: PPOConfig, inputs: Inputs) -> dict[type[Any], dict[str, Any]]:
    """The constructor arguments of each worker class, the same with and without Ray."""
    return {
        RolloutWorker: _rollout_arguments(config, inputs),
        RewardWorker: _reward_arguments(config, inputs),
        ReferenceWorker: _reference_arguments(config, inputs),
        LearnerWorker: _learner_arguments(config, inputs),
    }


def _rollout_arguments(config: PPOConfig, inputs: Inputs) -> dict[str, Any]:
    generation = config.generation
    return {
        "folder": inputs.policy,
        "prompts": inputs.prompts,
        "sampling": Sampling(
            temperature=generation.temperature,
            max_new_tokens=generation.response_length,
            stop=tuple(generation.stop),
        ),
        "seed": config.seed,
        "eos_id": inputs.tokenizer.eos_id,
        "pad_id": inputs.tokenizer.pad_id,
        "max_rows": generation.shard_size,
        "device": inputs.device,
        "dtype": DTYPES[generation.dtype],
        "threads": config.rollout_threads,
        "share": max(1, (os.cpu_count() or 1) // max(1, config.num_rollout_workers)),
        "engine": generation.engine,
        "tokenizer": inputs.tokenizer if generation.stop else None,
    }


def _reward_arguments(config: PPOConfig, inputs: Inputs) -> dict[str, Any]:
    context = RewardContext(
        tokenizer=inputs.tokenizer,
        prompts=inputs.prompts,
        device=inputs.device,
        dtype=compute_type(DTYPES[config.ppo.dtype], inputs.device),
        micro_batch_size=config.ppo.micro_batch_size,
        micro_batch_tokens=config.ppo.micro_batch_tokens,
        max_length=row_length(config),
    )
    return {"sources": config.reward_sources, "context": context, "threads": config.scoring_threads}


def _reference_arguments(config: PPOConfig, inputs: Inputs) -> dict[str, Any]:
    return {
        "folder": inputs.policy,
        "temperature": config.generation.temperature,
        "micro_batch_size": config.ppo.micro_batch_size,
        "micro_batch_tokens": config.ppo.micro_batch_tokens,
        "device": inputs.device,
        "dtype": compute_type(DTYPES[config.ppo.dtype], inputs.device),
        "threads": config.scoring_threads,
    }


def _learner_arguments(config: PPOConfig, inputs: Inputs) -> dict[str, Any]:
    build = partial(
        build_policy_critic,
        config.ppo.critic,
        inputs.policy,
        inputs.critic_init,
        temperature=config.generation.temperature,
        device=inputs.device,
        dtype=compute_type(DTYPES[config.ppo.dtype], inputs.device),
        compiled=config.ppo.compile,
        special={name: getattr(inputs.tokenizer, name) for name in ("pad_id", "bos_id", "eos_id")},
    )
    return {
        "build": build,
        "config": config.ppo,
        "seed": config.seed,
        "total_steps": config.total_steps,
        "response_length": config.generation.response_length,
        "rollout_dtype": DTYPES[config.generation.dtype],
        "threads": config.learner_threads or os.cpu_count() or 1,
    }


def crews(config: PPOConfig, inputs: Inputs, startup: StartUp) -> dict[type[Any], Crew]:
    """One crew a worker class: in this process without rollout workers, else Ray actors, all starting at once."""
    arguments = worker_arguments(config, inputs)
    if config.num_rollout_workers == 0:
        local = {worker: LocalCrew(worker(**arguments[worker])) for worker in arguments}
        startup.done("workers")
        return dict(local)
    shares = {  # worker: (role, how many, CPUs, GPUs of each)
        RolloutWorker: ("rollout", config.num_rollout_workers, config.rollout_cpus, config.rollout_gpus),
        RewardWorker: ("reward", config.num_reward_workers, config.service_cpus, config.reward_gpus),
        ReferenceWorker: (
            "reference",
            config.num_reference_workers,
            config.service_cpus,
            config.reference_gpus,
        ),
        LearnerWorker: ("learner", 1, config.service_cpus, config.learner_gpus),
    }
    on_gpu = inputs.device == "cuda"
    connect(
        need={
            "CPU": sum(size * cpus for _, size, cpus, _ in shares.values()),
            "GPU": sum(size * gpus for _, size, _, gpus in shares.values()) if on_gpu else 0.0,
        }
    )
    startup.done("ray")
    built = {
        worker: RayCrew(
            worker,
            arguments[worker],
            role=role,
            size=size,
            cpus=cpus,
            gpus=gpus if on_gpu else 0.0,
            timeout=config.timeout,
            aside=worker is LearnerWorker,  # which writes checkpoints beside its work
        )
        for worker, (role, size, cpus, gpus) in shares.items()
    }
    wait_until_built(list(built.values()))
    startup.done("workers")
    return dict(built)
