"""From a PPO configuration to a finished run: inputs, roles, algorithm.

Left out on purpose: training what is missing first, which is ``pipeline.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rlhf_ray.algorithms import ALGORITHMS
from rlhf_ray.checkpoint import CheckpointError, CheckpointStore, verify
from rlhf_ray.config import PPOConfig, repository_path
from rlhf_ray.config.run_fields import HOW_TO_RUN
from rlhf_ray.config.secrets import redacted
from rlhf_ray.crews import DTYPES, crews
from rlhf_ray.failures import Deaths, GaveUp, WorkerLost
from rlhf_ray.models.folders import model_folder
from rlhf_ray.models.scoring import compute_type
from rlhf_ray.native import build_problem
from rlhf_ray.objectives.base import model_files
from rlhf_ray.ppo_inputs import Inputs, read_inputs
from rlhf_ray.rl_run import RLRun
from rlhf_ray.roles import Roles
from rlhf_ray.run import Run, prepare_folder, read_metrics
from rlhf_ray.runtime.all_crews import stop
from rlhf_ray.runtime.cluster import dashboard_address
from rlhf_ray.runtime.crew import RayCrew
from rlhf_ray.runtime.environment import in_a_job, stop_seconds
from rlhf_ray.runtime.train_state import digest
from rlhf_ray.startup import StartUp
from rlhf_ray.storage import Mirror, mirror_of
from rlhf_ray.workers.groups import GeneratorGroup, LearnerGroup, ReferenceGroup, RewardGroup
from rlhf_ray.workers.learner import LearnerWorker
from rlhf_ray.workers.reference import ReferenceWorker
from rlhf_ray.workers.reward import RewardWorker
from rlhf_ray.workers.rollout import RolloutWorker

SHORT_STOP = 30.0
"""Seconds to stop in that are worth a warning when there are fewer."""


def run_folder(config: PPOConfig) -> Path:
    """``checkpoints/ppo/<run>``."""
    return repository_path(config.checkpoints) / "ppo" / config.run


def is_complete(config: PPOConfig) -> bool:
    """Whether the run's newest checkpoint is that of its last step, and unaltered."""
    newest = CheckpointStore(run_folder(config), keep=config.keep).latest()
    if newest is None or int(newest.name.removeprefix("step_")) < config.total_steps:
        return False
    try:
        verify(newest)
    except CheckpointError:
        return False
    return True


def train_ppo(config: PPOConfig, startup: StartUp | None = None) -> Path:
    """Run PPO to its end, or until it is asked to stop; returns the run's folder.

    ``startup`` holds what came before; without it, start-up begins here.
    """
    startup = startup or StartUp()
    folder = run_folder(config)
    inputs = read_inputs(config)
    mirror = mirror_of(config, "ppo")
    prepare_folder(folder, mirror, overwrite=config.overwrite)
    settings = {name: value for name, value in config.resolved().items() if name not in NOT_SETTINGS}
    settings["inputs_sha256"] = digest(_input_files(config, inputs))
    with Run.open(folder, settings, resume=config.resume, allow_config_change=config.allow_config_change) as run:
        if config.resume and is_complete(config):
            run.say(f"complete already, {config.total_steps} steps in {folder}; take another --run, or --overwrite")
            CheckpointStore(folder, keep=config.keep, keep_every=config.keep_every, mirror=mirror).close()
            return folder
        run.say(f"ppo: writing to {folder}")
        _say_inputs(run, config, inputs)
        startup.done("inputs")
        try:
            _train(config, inputs, run, startup, mirror)
        finally:
            _forget_unless_begun(folder)
    return folder


def _train(config: PPOConfig, inputs: Inputs, run: Run, startup: StartUp, mirror: Mirror | None) -> None:
    deaths = Deaths(config.max_restarts, config.restart_window, run.say)
    built = crews(config, inputs, startup, deaths)
    actors = [crew for crew in built.values() if isinstance(crew, RayCrew)]
    run.install_signal_handlers()
    if in_a_job() and stop_seconds() < SHORT_STOP:
        run.say(
            f"ray job stop will leave this run {stop_seconds():g} s to finish its step and save; set "
            "RAY_JOB_STOP_WAIT_TIME_S in the job's runtime_env to give it more (docs/CLUSTER.md)"
        )
    learner = LearnerGroup(built[LearnerWorker])
    roles = Roles(
        generator=GeneratorGroup(built[RolloutWorker], shard_size=config.generation.shard_size),
        reward=RewardGroup(built[RewardWorker]),
        reference=ReferenceGroup(built[ReferenceWorker]),
        learner=learner,
    )
    if config.num_rollout_workers:
        run.say(f"Ray dashboard: {dashboard_address()}")
    course = partial(RLRun, run, config, roles, learner, inputs.tokenizer, inputs.prompts, mirror=mirror, deaths=deaths)
    try:
        lost = _follow(partial(course, startup=startup))
        while lost:
            deaths.note(lost.who, lost.why, "the run goes back to its last checkpoint")
            for crew in actors:
                crew.restart() if crew.together else crew.abandon()
            lost = _follow(course)
    finally:
        stop(actors)


def _follow(course: Callable[[], RLRun]) -> WorkerLost | None:
    """Run the algorithm to its end, or until the learner is lost, and with it what came after the last checkpoint."""
    lost = None
    try:
        rl_run = course()
    except WorkerLost as error:
        return error
    try:
        with rl_run.run.written():  # while there are still workers to write from
            ALGORITHMS["ppo"](rl_run.config, rl_run.roles, rl_run)
    except WorkerLost as error:
        lost = error
    except GaveUp:
        rl_run.save_what_is_done()
        raise
    finally:
        rl_run.close()
    rl_run.store.wait() if lost else rl_run.store.close()
    return lost


def _input_files(config: PPOConfig, inputs: Inputs) -> list[Path]:
    """Prompts, and weights and vocabularies of all models: a run that goes on must find the ones it began with."""
    models = [model_folder(source.source) for source in config.reward_sources if source.kind == "model"]
    folders = [inputs.policy, *models, *([inputs.critic_init] if inputs.critic_init else [])]
    return [repository_path(config.prompts), *(file for folder in folders for file in model_files(folder))]


def _forget_unless_begun(folder: Path) -> None:
    """Take back the configuration of a run that did no step, so that it does not bind the next attempt."""
    if not read_metrics(folder) and CheckpointStore(folder, keep=1).latest() is None:
        for name in ("config.yaml", "metrics.jsonl"):
            (folder / name).unlink(missing_ok=True)


NOT_SETTINGS = (
    *(*HOW_TO_RUN, "max_bad_rows", "cache", "timeout", "call_timeout", "max_restarts", "restart_window"),
    *("num_rollout_workers", "num_reward_workers", "num_reference_workers", "num_learners", "sharding"),
    *("rollout_cpus", "service_cpus", "rollout_gpus", "reward_gpus", "reference_gpus", "learner_gpus"),
    *("placement", "rollout_device", "labels"),
)
"""Fields that say how to start and where to compute, not what; a resumed run may differ in them."""


def _say_inputs(run: Run, config: PPOConfig, inputs: Inputs) -> None:
    prompts = inputs.prompts
    lost = f" ({prompts.dropped} too long and dropped, {prompts.cut} cut)" if prompts.dropped + prompts.cut else ""
    rewards = " + ".join(f"{source.weight:g} x {redacted(source.source)}" for source in config.reward_sources)
    run.say(f"policy {inputs.policy}; {len(prompts)} prompts{lost}; reward {rewards}")
    if inputs.device == "cpu" and config.generation.engine == "auto" and (problem := build_problem()):
        run.say(f"generation by plain torch, which is slower than the native pass: {problem}")
    if compute_type(DTYPES[config.ppo.dtype], inputs.device) != DTYPES[config.ppo.dtype]:
        run.say("ppo.dtype bfloat16: this CPU only emulates it, slowly; learner, reference and reward take float32")
    if config.ppo.critic == "separate" and inputs.critic_init is None:
        run.say("no reward model to start the critic from: it starts from the policy with a new value head")
