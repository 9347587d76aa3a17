"""The workers of a PPO run: what each is built with, and where it runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from rlhf_ray.config import PPOConfig, repository_path
from rlhf_ray.failures import Deaths
from rlhf_ray.generation.sampling import Sampling
from rlhf_ray.models.scoring import compute_type
from rlhf_ray.ppo_inputs import Inputs, row_length
from rlhf_ray.rewards import RewardContext
from rlhf_ray.runtime.all_crews import wait_until_built
from rlhf_ray.runtime.cluster import check_shared, connect, nodes, start
from rlhf_ray.runtime.crew import RayCrew
from rlhf_ray.runtime.loan import Loan
from rlhf_ray.runtime.pending import Pending
from rlhf_ray.runtime.placement import Node, Request, Seat
from rlhf_ray.runtime.rendezvous import Rendezvous
from rlhf_ray.runtime.weight_sync import Broadcasts
from rlhf_ray.shortage import Portion, micro_batch
from rlhf_ray.startup import StartUp
from rlhf_ray.workers.build_learner import build_policy_critic
from rlhf_ray.workers.groups import Crew, LocalCrew
from rlhf_ray.workers.learner import LearnerWorker
from rlhf_ray.workers.limit import within
from rlhf_ray.workers.reference import ReferenceWorker
from rlhf_ray.workers.reward import RewardWorker
from rlhf_ray.workers.rollout import RolloutWorker

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROLES: dict[type[Any], str] = {  # in the order in which they are built: the learner has what others may borrow
    LearnerWorker: "learner",
    RolloutWorker: "rollout",
    RewardWorker: "reward",
    ReferenceWorker: "reference",
}


Own = Callable[[], Sequence[dict[str, Any]]]
"""What each worker's arguments differ in."""


def worker_arguments(config: PPOConfig, inputs: Inputs) -> dict[type[Any], dict[str, Any]]:
    """The constructor arguments of each worker class, the same with and without Ray.

    With LoRA nobody is a reference alone: it is the learner's policy without its adapters.
    """
    arguments = {
        LearnerWorker: _learner_arguments(config, inputs),
        RolloutWorker: _rollout_arguments(config, inputs),
        RewardWorker: _reward_arguments(config, inputs),
    }
    return arguments if config.lora.rank else {**arguments, ReferenceWorker: _reference_arguments(config, inputs)}


def _rollout_arguments(config: PPOConfig, inputs: Inputs) -> dict[str, Any]:
    generation = config.generation
    return {
        "folder": inputs.policy,
        "prompts": inputs.all_prompts,
        "sampling": Sampling(
            temperature=generation.temperature,
            max_new_tokens=generation.response_length,
            stop=tuple(generation.stop),
        ),
        "seed": config.seed,
        "eos_id": inputs.tokenizer.eos_id,
        "pad_id": inputs.tokenizer.pad_id,
        "max_rows": min(generation.max_rows or generation.shard_size, generation.shard_size),
        "device": inputs.device,
        "dtype": DTYPES[generation.dtype],
        "threads": config.rollout_threads,
        "share": os.cpu_count() or 1,
        "engine": generation.engine,
        "tokenizer": inputs.tokenizer if generation.stop else None,
        "lora": config.lora if config.lora.rank else None,
        "auto_micro_batch": config.auto_micro_batch,
        "base": inputs.base,
    }


def _portion(config: PPOConfig) -> Portion:
    """What a forward pass takes."""
    ppo = config.ppo
    return micro_batch(ppo.micro_batch_size, ppo.micro_batch_tokens, section="ppo.", auto=config.auto_micro_batch)


def reward_context(config: PPOConfig, inputs: Inputs) -> RewardContext:
    """What rewards and judges are built with."""
    return RewardContext(
        tokenizer=inputs.tokenizer,
        prompts=inputs.all_prompts,
        device=inputs.device,
        dtype=compute_type(DTYPES[config.ppo.dtype], inputs.device),
        portion=_portion(config),
        max_length=row_length(config),
        frozen=config.memory.frozen,
        base=inputs.base,
    )


def _reward_arguments(config: PPOConfig, inputs: Inputs) -> dict[str, Any]:
    context = reward_context(config, inputs)
    return {"sources": config.reward_sources, "context": context, "threads": config.scoring_threads}


def _reference_arguments(config: PPOConfig, inputs: Inputs) -> dict[str, Any]:
    return {
        "folder": inputs.policy,
        "temperature": config.generation.temperature,
        "portion": _portion(config),
        "device": inputs.device,
        "dtype": compute_type(DTYPES[config.ppo.dtype], inputs.device),
        "threads": config.scoring_threads,
        "frozen": config.memory.frozen,
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
        checkpointing=config.memory.activation_checkpointing,
        special={name: getattr(inputs.tokenizer, name) for name in ("pad_id", "bos_id", "eos_id")},
        lora=config.lora,
        base=inputs.base,
        seed=config.seed,
    )
    return {
        "build": build,
        "config": config.ppo,
        "seed": config.seed,
        "total_steps": config.total_steps,
        "response_length": config.generation.response_length,
        "rollout_dtype": DTYPES[config.generation.dtype],
        "threads": config.learner_threads,
        "sharding": config.sharding,
        "optimizer_bits": config.memory.optimizer_bits,
        "offload_optimizer": config.memory.offload_optimizer,
        "direct_versions": _direct_versions(config),
        "auto_micro_batch": config.auto_micro_batch,
    }


def _direct_versions(config: PPOConfig) -> int:
    """Versions that the learner keeps where weights go out directly: those of all rows under way; else 0."""
    return config.max_staleness + 1 if config.weight_sync == "direct" else 0


def _broadcasts(config: PPOConfig, device: str) -> bool:
    """Whether weights are broadcast."""
    return config.weight_sync == "direct" and device == "cpu"


def publication(built: Mapping[type[Any], Crew], say: Callable[[str], object]) -> Callable[[int], Pending] | None:
    """What asks for weights where they are broadcast; ``say`` is told when that fails."""
    learner, workers = built[LearnerWorker], built[RolloutWorker]
    if not (isinstance(learner, RayCrew) and isinstance(workers, RayCrew) and workers.beside):
        return None
    return Broadcasts(learner, workers, say).publish


def device_of_roles(asked: str, here: str, machines: Sequence[Node]) -> str:
    """The device of a run: the one asked for, else cuda where Ray has a GPU to give; ``here`` is this process's own.

    A driver that sees no GPU, as on the head of a cluster, can't tell what the others are like, and believes Ray.
    """
    if asked != "auto":
        return asked
    return "cuda" if any(node.gpus and (here == "cuda" or not node.here) for node in machines) else "cpu"


def requests(config: PPOConfig, device: str) -> list[Request]:
    """What each role asks the cluster for; who comes first chooses first."""
    gpu = float(device == "cuda")
    labels = {role: dict(label.split("=") for label in wanted) for role, wanted in config.labels}

    def asks(role: str, count: int, cpus: float, gpus: float, **where: Any) -> Request:
        return Request(role=role, count=count, cpus=cpus, gpus=gpu * gpus, labels=labels[role], **where)

    needed = [
        asks("learner", config.num_learners, config.service_cpus, config.learner_gpus),
        asks(
            "rollout",
            config.num_rollout_workers,
            config.rollout_cpus,
            config.rollout_gpus * (config.rollout_device != "cpu"),
            gpu="welcome" if config.rollout_device == "any" else "needed",
            spread=config.placement == "spread",
        ),
        asks("reward", config.num_reward_workers, config.service_cpus, config.reward_gpus),
        asks("reference", config.num_reference_workers, config.service_cpus, config.reference_gpus),
    ]
    return [request for request in needed if request.role != "reference" or not config.lora.rank]


def check_cards(config: PPOConfig, device: str) -> None:
    """ValueError when two learners may land on one GPU, where NCCL does not let them speak to each other."""
    if device == "cuda" and config.num_learners > 1 and config.learner_gpus <= 0.5:
        raise ValueError(
            f"num_learners = {config.num_learners} need a GPU each; learner_gpus = {config.learner_gpus:g} lets two "
            "share one: take --learner-gpus 0.6, or 1 where nothing else needs a share of those GPUs"
        )


def _own(config: PPOConfig, seats: Sequence[Seat], device: str) -> list[dict[str, Any]]:
    """What rollout workers' places decide about them: their device, and how many threads the native pass takes."""
    same = config.rollout_device == "same"
    return [{"device": device if same or seat.gpus else "cpu", "share": seat.cores} for seat in seats]


def _borrowing(loan: Loan, own: Own, arguments: Mapping[type[Any], Any], config: PPOConfig) -> dict[type[Any], Own]:
    """The same of all workers that may be on the learner's card: its base."""
    context, count = arguments[RewardWorker]["context"], config.num_reward_workers
    return {
        RolloutWorker: loan.given(own, lambda base: {"base": base}),
        RewardWorker: loan.given(lambda: [{}] * count, lambda base: {"context": replace(context, base=base)}),
    }


def crews(
    config: PPOConfig, inputs: Inputs, startup: StartUp, deaths: Deaths, limits: Mapping[str, int]
) -> dict[type[Any], Crew]:
    """One crew a worker class: in this process without rollout workers, else Ray actors, all starting at once.

    ``limits`` are the bytes of its GPU that a role's process may take; a role without one knows no limit.
    """
    if config.num_rollout_workers:
        start()
        inputs = replace(inputs, device=device_of_roles(config.device, inputs.device, nodes()))
    arguments = worker_arguments(config, inputs)
    make: dict[type[Any], Callable[..., Any]] = {
        worker: partial(within, worker, limits[role]) if role in limits else worker for worker, role in ROLES.items()
    }
    if config.num_rollout_workers == 0:
        local = {worker: LocalCrew(make[worker](**arguments[worker])) for worker in arguments}
        startup.done("workers")
        return dict(local)
    check_cards(config, inputs.device)
    seats = connect(need=requests(config, inputs.device))
    away = {seat.node.id: seat.node for role in seats.values() for seat in role if not seat.node.here}
    check_shared([inputs.policy, repository_path(config.checkpoints)], away.values())
    startup.done("ray")
    own: dict[type[Any], Own] = {RolloutWorker: partial(_own, config, seats["rollout"], inputs.device)}
    own[LearnerWorker] = Rendezvous(config.num_learners, timeout=config.timeout)
    lent = inputs.base if inputs.base and inputs.base.shared and inputs.device == "cuda" else None
    built: dict[type[Any], RayCrew] = {}
    for worker in arguments:
        if lent and worker is RolloutWorker:
            wait_until_built([built[LearnerWorker]])
            own |= _borrowing(Loan(built[LearnerWorker], lent), own[worker], arguments, config)
        role = ROLES[worker]
        built[worker] = RayCrew(
            make[worker],
            arguments[worker],
            role=role,
            run=config.run,
            seats=seats[role],
            own=own.get(worker),
            deaths=deaths,
            timeout=config.timeout,
            call_timeout=config.timeout if worker is LearnerWorker else config.call_timeout,
            together=worker is LearnerWorker,
            beside=worker is RolloutWorker and _broadcasts(config, inputs.device),
            borrows=lent is not None and worker is not LearnerWorker,
        )
    wait_until_built(list(built.values()))
    startup.done("workers")
    return dict(built)
