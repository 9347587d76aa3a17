"""From a PPO configuration to a finished run: inputs, roles, algorithm.

Left out on purpose: training what is missing first, which is ``pipeline.py``'s.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rlhf_ray.algorithms import ALGORITHMS
from rlhf_ray.checkpoint import CheckpointStore, RunLock, load_tree
from rlhf_ray.config import PPOConfig, repository_path
from rlhf_ray.crews import DTYPES, crews
from rlhf_ray.native import build_problem
from rlhf_ray.models.scoring import compute_type
from rlhf_ray.ppo_inputs import Inputs, read_inputs
from rlhf_ray.rl_run import RLRun
from rlhf_ray.roles import Roles
from rlhf_ray.run import Run, read_metrics
from rlhf_ray.runtime.cluster import dashboard_address
from rlhf_ray.runtime.crew import RayCrew, stop
from rlhf_ray.startup import StartUp
from rlhf_ray.workers.groups import GeneratorGroup, LearnerGroup, ReferenceGroup, RewardGroup
from rlhf_ray.workers.learner import LearnerWorker
from rlhf_ray.workers.reference import ReferenceWorker
from rlhf_ray.workers.reward import RewardWorker
from rlhf_ray.workers.rollout import RolloutWorker


def run_folder(config: PPOConfig) -> Path:
    """``checkpoints/ppo/<run>``."""
    return repository_path(config.checkpoints) / "ppo" / config.run


def is_complete(config: PPOConfig) -> bool:
    """Whether the run's newest checkpoint is that of its last step."""
    newest = CheckpointStore(run_folder(config), keep=config.keep).latest()
    return newest is not None and bool(load_tree(newest / "run")["step"] >= config.total_steps)


def train_ppo(config: PPOConfig, startup: StartUp | None = None) -> Path:
    """Run PPO to its end, or until it is asked to stop; returns the run's folder.

    ``startup`` holds what came before; without it, start-up begins here.
    """
    startup = startup or StartUp()
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
        startup.done("inputs")
        try:
            _train(config, inputs, run, startup)
        finally:
            _forget_unless_begun(folder)
    return folder


def _train(config: PPOConfig, inputs: Inputs, run: Run, startup: StartUp) -> None:
    built = crews(config, inputs, startup)
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
        rl_run = RLRun(run, config, roles, learner, inputs.tokenizer, inputs.prompts, startup)
        with run.written():  # while there are still workers to write from
            ALGORITHMS["ppo"](config, roles, rl_run)
    finally:
        stop([crew for crew in built.values() if isinstance(crew, RayCrew)])


def _forget_unless_begun(folder: Path) -> None:
    """Take back the configuration of a run that did no step, so that it does not bind the next attempt."""
    if not read_metrics(folder) and CheckpointStore(folder, keep=1).latest() is None:
        for name in ("config.yaml", "metrics.jsonl"):
            (folder / name).unlink(missing_ok=True)


NOT_SETTINGS = (
    *("resume", "allow_config_change", "overwrite", "max_bad_rows", "timeout", "keep", "cache"),
    *("num_rollout_workers", "num_reward_workers", "num_reference_workers"),
    *("rollout_cpus", "service_cpus", "rollout_gpus", "reward_gpus", "reference_gpus", "learner_gpus"),
)
"""Fields that say how to start and where to compute, not what; a resumed run may differ in them."""


def _say_inputs(run: Run, config: PPOConfig, inputs: Inputs) -> None:
    prompts = inputs.prompts
    lost = f" ({prompts.dropped} too long and dropped, {prompts.cut} cut)" if prompts.dropped + prompts.cut else ""
    rewards = " + ".join(f"{source.weight:g} x {source.source}" for source in config.reward_sources)
    run.say(f"policy {inputs.policy}; {len(prompts)} prompts{lost}; reward {rewards}")
    if inputs.device == "cpu" and config.generation.engine == "auto" and (problem := build_problem()):
        run.say(f"generation by plain torch, which is slower than the native pass: {problem}")
    if compute_type(DTYPES[config.ppo.dtype], inputs.device) != DTYPES[config.ppo.dtype]:
        run.say("ppo.dtype bfloat16: this CPU only emulates it, slowly; learner, reference and reward take float32")
    if config.ppo.critic == "separate" and inputs.critic_init is None:
        run.say("no reward model to start the critic from: it starts from the policy with a new value head")
