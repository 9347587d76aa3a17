"""From a PPO configuration to a finished run: inputs, roles, algorithm.

Left out on purpose: training what is missing first, which is ``pipeline.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rlhf_ray.algorithms import ALGORITHMS
from rlhf_ray.checkpoint import CheckpointError, CheckpointStore, step_name, verify
from rlhf_ray.config import PPOConfig, RewardSource, repository_path
from rlhf_ray.config.run_fields import HOW_TO_RUN
from rlhf_ray.config.secrets import redacted
from rlhf_ray.crews import DTYPES, crews, publication, reward_context
from rlhf_ray.data.lint import Ruler
from rlhf_ray.data.lint_report import brief
from rlhf_ray.failures import Deaths, Diverged, GaveUp, WorkerLost
from rlhf_ray.fitting import fit, limits, report
from rlhf_ray.models.folders import model_folder
from rlhf_ray.models.scoring import compute_type
from rlhf_ray.native import build_problem
from rlhf_ray.objectives.base import model_files
from rlhf_ray.ppo_inputs import Inputs, read_inputs
from rlhf_ray.report import report_run
from rlhf_ray.rewards.function import FunctionReward
from rlhf_ray.rl_run import RLRun
from rlhf_ray.roles import Roles
from rlhf_ray.run import Run, prepare_folder, read_metrics
from rlhf_ray.runtime.all_crews import stop
from rlhf_ray.runtime.cluster import dashboard_address
from rlhf_ray.runtime.crew import RayCrew
from rlhf_ray.runtime.environment import in_a_job, stop_seconds
from rlhf_ray.runtime.metrics import StepMetrics, place_dashboard
from rlhf_ray.runtime.step_trace import CrewsTrace, StepTrace
from rlhf_ray.runtime.train_state import digest
from rlhf_ray.startup import StartUp
from rlhf_ray.storage import Mirror, mirror_of
from rlhf_ray.tokenizer import find_template
from rlhf_ray.workers.groups import BaseReferenceGroup, GeneratorGroup, LearnerGroup, ReferenceGroup, RewardGroup
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
    settings = config.resolved(without=NOT_SETTINGS)
    settings["inputs_sha256"] = digest(_input_files(config, inputs))
    with Run.open(folder, settings, resume=config.resume, allow_config_change=config.allow_config_change) as run:
        if config.resume and is_complete(config):
            run.say(f"complete already, {config.total_steps} steps in {folder}; take another --run, or --overwrite")
            CheckpointStore(folder, keep=config.keep, keep_every=config.keep_every, mirror=mirror).close()
            return folder
        run.say(f"ppo: writing to {folder}")
        _say_inputs(run, config, inputs)
        inputs = _with_base(run, config, inputs)
        startup.done("inputs")
        try:
            _train(config, inputs, run, startup, mirror)
        except (Diverged, GaveUp):
            _report(config, run)  # which shows what went wrong
            raise
        finally:
            _forget_unless_begun(folder)
        _report(config, run)
    return folder


def _report(config: PPOConfig, run: Run) -> None:
    if config.report:
        report_run(run.folder, run.say)


def _train(config: PPOConfig, inputs: Inputs, run: Run, startup: StartUp, mirror: Mirror | None) -> None:
    deaths = Deaths(config.max_restarts, config.restart_window, run.say)
    judges = _judges(config, inputs)
    plan = fit(config, inputs, run.say)
    config = plan.config if plan else config
    built = crews(config, inputs, startup, deaths, limits(plan))
    actors = [crew for crew in built.values() if isinstance(crew, RayCrew)]
    run.install_signal_handlers()
    _say_how_it_stops(run)
    learner = LearnerGroup(built[LearnerWorker], publish=publication(built, run.say))
    roles = Roles(
        generator=GeneratorGroup(built[RolloutWorker], shard_size=config.generation.shard_size),
        reward=RewardGroup(built[RewardWorker]),
        reference=BaseReferenceGroup(learner.crew) if config.lora.rank else ReferenceGroup(built[ReferenceWorker]),
        learner=learner,
    )
    shown = _shown(config, run, actors)
    course = partial(
        RLRun,
        run,
        config,
        roles,
        learner,
        inputs.tokenizer,
        inputs.prompts,
        mirror=mirror,
        deaths=deaths,
        probes=len(inputs.probes),
        watch=shown.log if shown else None,
        judges=judges,
        trace=_trace(config, run, actors),
    )
    try:
        lost = _follow(partial(course, startup=startup))
        while lost:
            if isinstance(lost, Diverged):
                course = partial(course, rollbacks=lost.rollbacks + 1)
            else:
                deaths.note(lost.who, lost.why, "the run goes back to its last checkpoint")
            for crew in actors:
                anew = isinstance(lost, WorkerLost) and (crew.together or crew.borrows)
                crew.restart() if anew else crew.abandon()
            lost = _follow(course)
        if plan:
            report(plan, built, run, inputs.base)
    finally:
        if shown:
            shown.close()
        stop(actors)


def _say_how_it_stops(run: Run) -> None:
    if in_a_job() and stop_seconds() < SHORT_STOP:
        run.say(
            f"ray job stop will leave this run {stop_seconds():g} s to finish its step and save; set "
            "RAY_JOB_STOP_WAIT_TIME_S in the job's runtime_env to give it more (docs/CLUSTER.md)"
        )


def _shown(config: PPOConfig, run: Run, actors: Sequence[RayCrew]) -> StepMetrics | None:
    """What Prometheus is told of each step, if the run is on Ray; says where Ray's dashboard is."""
    if not actors:
        return None
    run.say(f"Ray dashboard: {dashboard_address()} (for the token that it asks for: ray get-auth-token)")
    place_dashboard()
    return StepMetrics(config.run, [crew.queue for crew in actors])


def _trace(config: PPOConfig, run: Run, actors: Sequence[RayCrew]) -> StepTrace:
    """The trace of the step that is asked for, if one is."""
    if not actors:
        return StepTrace(run.folder, config.profile_step, name="all roles")
    patience = config.call_timeout
    return CrewsTrace(run.folder, config.profile_step, name="driver", crews=actors, patience=patience)


def _follow(course: Callable[[], RLRun]) -> WorkerLost | Diverged | None:
    """Run the algorithm to its end, or until the run has to go back to its last checkpoint, because what came after it
    was lost with the learner or has diverged.
    """
    lost: WorkerLost | Diverged | None = None
    try:
        rl_run = course()
    except WorkerLost as error:
        return error
    try:
        with rl_run.run.written():  # while there are still workers to write from
            ALGORITHMS["ppo"](rl_run.config, rl_run.roles, rl_run)
    except WorkerLost as error:
        lost = error
    except Diverged as error:
        rl_run.go_back(error)
        lost = error
    except GaveUp:
        rl_run.save_what_is_done()
        raise
    finally:
        rl_run.close()
    rl_run.store.wait() if lost else rl_run.store.close()
    return lost


def _judges(config: PPOConfig, inputs: Inputs) -> dict[str, FunctionReward]:
    """Judges by the names of their functions."""
    context = reward_context(config, inputs)
    sources = [RewardSource(kind="function", source=source) for source in config.judges]
    return {s.source.rpartition(":")[2]: FunctionReward(s, context, field="judges") for s in sources}


def _input_files(config: PPOConfig, inputs: Inputs) -> list[Path]:
    """Prompts, and weights and vocabularies of all models: a run that goes on must find the ones it began with."""
    models = [model_folder(source.source) for source in config.reward_sources if source.kind == "model"]
    folders = [inputs.policy, *models, *([inputs.critic_init] if inputs.critic_init else [])]
    return [repository_path(config.prompts), *(file for folder in folders for file in model_files(folder))]


def _forget_unless_begun(folder: Path) -> None:
    """Take back the configuration of a run that did no step, so that it does not bind the next attempt."""
    store = CheckpointStore(folder, keep=1)
    if not read_metrics(folder) and store.latest() in (None, folder / step_name(0)):
        store.forget(after=-1)
        for name in ("config.yaml", "machine.json", "metrics.jsonl"):
            (folder / name).unlink(missing_ok=True)


NOT_SETTINGS = (
    *(*HOW_TO_RUN, "max_bad_rows", "cache", "timeout", "call_timeout", "max_restarts", "restart_window"),
    *("num_rollout_workers", "num_reward_workers", "num_reference_workers", "num_learners", "sharding", "weight_sync"),
    *("rollout_cpus", "service_cpus", "rollout_gpus", "reward_gpus", "reference_gpus", "learner_gpus"),
    *("gpu_memory", "host_memory", "generation.max_rows"),
    *("placement", "rollout_device", "labels", "judges", "on_divergence", "probes", "probe_every", "probe_prompts"),
)
"""Fields that say how to start, where to compute and what to watch; a resumed run may differ in them."""


def _with_base(run: Run, config: PPOConfig, inputs: Inputs) -> Inputs:
    """The inputs, with a base that workers share only if its file is there; says who reads it, and who has another."""
    if inputs.base is None or not inputs.base.shared:
        return inputs
    base, models = inputs.base.base, [s.source for s in config.reward_sources if s.kind == "model"]
    try:
        file = inputs.base.file(read_through=True)
    except OSError as error:
        run.say(f"memory: every process has a copy of {base.folder}: {error}")
        return replace(inputs, base=replace(inputs.base, shared=False))
    over = {source: base.is_under(model_folder(source)) for source in models}
    roles = ["rollout", "learner", *(f"reward {source}" for source, shares in over.items() if shares)]
    others = "".join(f"; {source} has weights of its own" for source, shares in over.items() if not shares)
    size = f"{file.stat().st_size / 1e9:.2f} GB"
    run.say(f"memory: {', '.join(roles)} read one copy of {base.folder} in {base.frozen}, {size}, {file}{others}")
    return inputs


def _say_inputs(run: Run, config: PPOConfig, inputs: Inputs) -> None:
    prompts = inputs.prompts
    lost = f" ({prompts.dropped} too long and dropped, {prompts.cut} cut)" if prompts.dropped + prompts.cut else ""
    rewards = " + ".join(f"{source.weight:g} x {redacted(source.source)}" for source in config.reward_sources)
    run.say(f"policy {inputs.policy}; {len(prompts)} prompts{lost}; reward {rewards}")
    template, limit = find_template(config.template), config.generation.prompt_length
    ruler = Ruler(tokenizer=inputs.tokenizer, template=template, limit=limit)
    brief([repository_path(config.prompts)], "prompts", ruler, run.say)
    if inputs.device == "cpu" and config.generation.engine == "auto" and (problem := build_problem()):
        run.say(f"generation by plain torch, which is slower than the native pass: {problem}")
    if compute_type(DTYPES[config.ppo.dtype], inputs.device) != DTYPES[config.ppo.dtype]:
        run.say("ppo.dtype bfloat16: this CPU only emulates it, slowly; learner, reference and reward take float32")
    if inputs.device == "cpu" and config.memory.offload_optimizer:
        run.say("memory.offload_optimizer: on a CPU the moments are in host memory as it is")
    if config.ppo.critic == "separate" and inputs.critic_init is None:
        run.say("no reward model to start the critic from: it starts from the policy with a new value head")
