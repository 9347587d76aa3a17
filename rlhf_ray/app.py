"""From a PPO configuration to a finished run: inputs, roles, algorithm.

Left out on purpose: training what is missing first, which is ``pipeline.py``'s.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.algorithms import ALGORITHMS
from rlhf_ray.checkpoint import CheckpointStore, RunLock, load_tree
from rlhf_ray.config import PPOConfig, repository_path
from rlhf_ray.data.prompt_set import PromptSet, tokenise_prompts
from rlhf_ray.data.readers import read_prompts
from rlhf_ray.functions import load_function
from rlhf_ray.generation.load import find_device, recorded_template
from rlhf_ray.generation.sampling import Sampling
from rlhf_ray.models.folders import model_folder
from rlhf_ray.models.hf_weights import read_config
from rlhf_ray.rewards import RewardContext, reward_model_folder
from rlhf_ray.rl_run import RLRun
from rlhf_ray.roles import Roles
from rlhf_ray.run import Run, read_metrics
from rlhf_ray.runtime.cluster import connect, dashboard_address
from rlhf_ray.runtime.crew import RayCrew, stop, wait_until_built
from rlhf_ray.tokenizer import TEMPLATES, Tokenizer
from rlhf_ray.workers.groups import (
    Crew,
    GeneratorGroup,
    LearnerGroup,
    LocalCrew,
    ReferenceGroup,
    RewardGroup,
)
from rlhf_ray.workers.learner import LearnerWorker
from rlhf_ray.workers.policy_critic import build_policy_critic
from rlhf_ray.workers.reference import ReferenceWorker
from rlhf_ray.workers.reward import RewardWorker
from rlhf_ray.workers.rollout import RolloutWorker

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a PPO run reads before it starts anything."""

    policy: Path
    """Hugging Face folder of the SFT policy."""
    tokenizer: Tokenizer
    prompts: PromptSet
    critic_init: Path | None
    """Reward model that the critic starts from; None starts it from the policy."""
    device: str


def run_folder(config: PPOConfig) -> Path:
    """``checkpoints/ppo/<run>``."""
    return repository_path(config.checkpoints) / "ppo" / config.run


def is_complete(config: PPOConfig) -> bool:
    """Whether the run's newest checkpoint is that of its last step."""
    newest = CheckpointStore(run_folder(config), keep=config.keep).latest()
    return newest is not None and bool(load_tree(newest / "run")["step"] >= config.total_steps)


def read_inputs(config: PPOConfig) -> Inputs:
    """Read and check prompts, vocabulary and model shapes; ValueError names the field that is wrong."""
    policy = model_folder(config.policy, field="policy")
    tokenizer = Tokenizer.load(policy)
    shape = read_config(policy)
    if shape.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"policy = {config.policy}: the model has {shape.vocab_size} tokens and its vocabulary "
            f"{tokenizer.vocab_size} (special tokens included); copy the files it was trained with"
        )
    template = recorded_template(policy)
    if template and template != config.template:
        raise ValueError(f"template = {config.template}: the policy was trained with the template {template}")
    longest = _row_length(config)
    if longest > shape.n_positions:
        raise ValueError(
            f"generation.prompt_length + generation.response_length = {longest} exceeds the model's context of "
            f"{shape.n_positions} tokens"
        )
    prompts = tokenise_prompts(
        read_prompts(repository_path(config.prompts), config.max_bad_rows),
        tokenizer,
        TEMPLATES[config.template],
        max_length=config.generation.prompt_length,
        long_prompts=config.generation.long_prompts,
    )
    return Inputs(
        policy=policy,
        tokenizer=tokenizer,
        prompts=prompts,
        critic_init=_critic_init(config, tokenizer),
        device=find_device(config.device).type,
    )


def _row_length(config: PPOConfig) -> int:
    """Tokens of the longest row that a step can have."""
    return config.generation.prompt_length + config.generation.response_length


def _critic_init(config: PPOConfig, tokenizer: Tokenizer) -> Path | None:
    """The reward model that the critic starts from, once every source of reward is known to be there."""
    if not config.reward_sources:
        raise ValueError("rewards is empty: give --reward path/to/file.py:function, a URL or a reward model's folder")
    fits = partial(reward_model_folder, tokenizer=tokenizer, length=_row_length(config))
    models = [fits(s.source, field="rewards.source") for s in config.reward_sources if s.kind == "model"]
    for source in config.reward_sources:
        if source.kind == "function":
            load_function(source.source, field="reward")
    if config.critic_init is not None:
        return fits(config.critic_init, field="critic_init")
    return models[0] if models else None


def worker_arguments(config: PPOConfig, inputs: Inputs) -> dict[type[Any], dict[str, Any]]:
    """The constructor arguments of each worker class, the same with and without Ray."""
    special = {name: getattr(inputs.tokenizer, name) for name in ("pad_id", "bos_id", "eos_id")}
    device, compute = inputs.device, DTYPES[config.ppo.dtype]
    generation = config.generation
    learner_threads = config.learner_threads or os.cpu_count() or 1
    context = RewardContext(
        tokenizer=inputs.tokenizer,
        prompts=inputs.prompts,
        device=device,
        dtype=compute,
        micro_batch_size=config.ppo.micro_batch_size,
        max_length=_row_length(config),
    )
    return {
        RolloutWorker: {
            "folder": inputs.policy,
            "prompts": inputs.prompts,
            "sampling": Sampling(
                temperature=generation.temperature,
                max_new_tokens=generation.response_length,
            ),
            "seed": config.seed,
            "eos_id": special["eos_id"],
            "pad_id": special["pad_id"],
            "max_rows": generation.shard_size,
            "device": device,
            "dtype": DTYPES[generation.dtype],
            "threads": config.rollout_threads,
        },
        RewardWorker: {
            "sources": config.reward_sources,
            "context": context,
            "threads": config.scoring_threads,
        },
        ReferenceWorker: {
            "folder": inputs.policy,
            "temperature": generation.temperature,
            "micro_batch_size": config.ppo.micro_batch_size,
            "device": device,
            "dtype": compute,
            "threads": config.scoring_threads,
        },
        LearnerWorker: {
            "build": partial(
                build_policy_critic,
                config.ppo.critic,
                inputs.policy,
                inputs.critic_init,
                temperature=generation.temperature,
                device=device,
                dtype=compute,
                special=special,
            ),
            "config": config.ppo,
            "seed": config.seed,
            "total_steps": config.total_steps,
            "response_length": generation.response_length,
            "rollout_dtype": DTYPES[generation.dtype],
            "threads": learner_threads,
        },
    }


def crews(config: PPOConfig, inputs: Inputs) -> dict[type[Any], Crew]:
    """One crew a worker class: in this process without rollout workers, else Ray actors, all starting at once."""
    arguments = worker_arguments(config, inputs)
    if config.num_rollout_workers == 0:
        return {worker: LocalCrew(worker(**arguments[worker])) for worker in arguments}
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
    built = {
        worker: RayCrew(
            worker,
            arguments[worker],
            role=role,
            size=size,
            cpus=cpus,
            gpus=gpus if on_gpu else 0.0,
            timeout=config.timeout,
        )
        for worker, (role, size, cpus, gpus) in shares.items()
    }
    wait_until_built(list(built.values()))
    return dict(built)


def train_ppo(config: PPOConfig) -> Path:
    """Run PPO to its end, or until it is asked to stop; returns the run's folder."""
    folder = run_folder(config)
    inputs = read_inputs(config)
    if config.overwrite and folder.exists():
        with RunLock(folder):
            shutil.rmtree(folder)
    settings = {name: value for name, value in config.resolved().items() if name not in NOT_SETTINGS}
    with Run.open(folder, settings, resume=config.resume, allow_config_change=config.allow_config_change) as run:
        if config.resume and is_complete(config):
            run.say(f"complete already, {config.total_steps} steps in {folder}; take another --run, or --overwrite")
            return folder
        run.say(f"ppo: writing to {folder}")
        _say_inputs(run, config, inputs)
        try:
            _train(config, inputs, run)
        finally:
            _forget_unless_begun(folder)
    return folder


def _train(config: PPOConfig, inputs: Inputs, run: Run) -> None:
    built = crews(config, inputs)
    run.install_signal_handlers()
    learner = LearnerGroup(built[LearnerWorker])
    roles = Roles(
        generator=GeneratorGroup(built[RolloutWorker], shard_size=config.generation.shard_size),
        reward=RewardGroup(built[RewardWorker]),
        reference=ReferenceGroup(built[ReferenceWorker]),
        learner=learner,
    )
    if config.num_rollout_workers:
        run.say(f"Ray dashboard: {dashboard_address()}")
    try:
        rl_run = RLRun(run, config, roles, learner, inputs.tokenizer, inputs.prompts)
        ALGORITHMS["ppo"](config, roles, rl_run)
    finally:
        stop([crew for crew in built.values() if isinstance(crew, RayCrew)])


def _forget_unless_begun(folder: Path) -> None:
    """Take back the configuration of a run that did no step, so that it does not bind the next attempt."""
    if not read_metrics(folder) and CheckpointStore(folder, keep=1).latest() is None:
        for name in ("config.yaml", "metrics.jsonl"):
            (folder / name).unlink(missing_ok=True)


NOT_SETTINGS = (
    *("resume", "allow_config_change", "overwrite", "max_bad_rows", "timeout", "keep"),
    *("num_rollout_workers", "num_reward_workers", "num_reference_workers"),
    *("rollout_cpus", "service_cpus", "rollout_gpus", "reward_gpus", "reference_gpus", "learner_gpus"),
)
"""Fields that say how to start and where to compute, not what; a resumed run may differ in them."""


def _say_inputs(run: Run, config: PPOConfig, inputs: Inputs) -> None:
    prompts = inputs.prompts
    lost = f" ({prompts.dropped} too long and dropped, {prompts.cut} cut)" if prompts.dropped + prompts.cut else ""
    rewards = " + ".join(f"{source.weight:g} x {source.source}" for source in config.reward_sources)
    run.say(f"policy {inputs.policy}; {len(prompts)} prompts{lost}; reward {rewards}")
    if config.ppo.critic == "separate" and inputs.critic_init is None:
        run.say("no reward model to start the critic from: it starts from the policy with a new value head")
