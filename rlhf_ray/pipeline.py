"""Every stage in order, each skipped when its output is complete and nothing that it depends on has changed.

Like make, but by content: a stage's stamp is a digest of its configuration, of the files that it reads and of the
stamps of the stages before it.  A stage whose stamp still holds is resumed when it was interrupted and skipped when it
was complete; otherwise its run is done anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray import app, console, stages
from rlhf_ray.config import (
    Config,
    EvaluateConfig,
    PipelineConfig,
    PPOConfig,
    TokenizerConfig,
    repository_path,
)
from rlhf_ray.models.folders import has_model
from rlhf_ray.report import FILE_NAME, report_run
from rlhf_ray.rundir.files import replace_text

STAMP = "pipeline.json"
DEFAULT_REWARD_MODEL = "checkpoints/reward_model/default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of the pipeline."""

    name: str
    config: Config
    inputs: tuple[Path, ...]
    """Files whose content counts."""
    folder: Path
    """Where it writes; holds its stamp."""
    run: Callable[[Any], Any]
    complete: Callable[[Any], bool]


def plan(config: PipelineConfig) -> list[Stage]:
    """The stages, each one's inputs being the outputs of those before it."""
    root = repository_path(config.checkpoints)
    places = {"pretrain": "pretrained", "sft": "sft", "reward_model": "reward_model", "ppo": "ppo"}
    folders = {stage: root / place / config.run for stage, place in places.items()}
    common = {"run": config.run, "seed": config.seed, "checkpoints": root}
    from_policy = [
        _sft(config, common, folders),
        _reward_model(config, common, folders),
        *_ppo_and_evaluation(config, common, folders),
    ]
    return from_policy if config.policy is not None else _from_raw_text(config, common, folders) + from_policy


def _from_raw_text(config: PipelineConfig, common: dict[str, Any], folders: dict[str, Path]) -> list[Stage]:
    """Tokenizer and pre-training."""
    vocabulary = repository_path(config.pretrain.tokenizer)
    tokenizer = TokenizerConfig(data=config.pretrain.data, output=vocabulary, vocab_size=config.pretrain.vocab_size)
    pretrain = config.pretrain.model_copy(update={**common, "tokenizer": vocabulary})
    return [
        Stage(
            name="tokenizer",
            config=tokenizer,
            inputs=_files(tokenizer.data),
            folder=vocabulary,
            run=stages.train_tokenizer,
            complete=lambda c: (c.output / "merges.txt").is_file(),
        ),
        _train_stage("pretrain", pretrain, pretrain.data, folders, stages.pretrain),
    ]


def _sft(config: PipelineConfig, common: dict[str, Any], folders: dict[str, Path]) -> Stage:
    base = folders["pretrain"] if config.policy is None else repository_path(config.policy)
    sft = config.sft.model_copy(update={**common, "policy": base})
    return _train_stage("sft", sft, sft.data, folders, stages.sft)


def _reward_model(config: PipelineConfig, common: dict[str, Any], folders: dict[str, Path]) -> Stage:
    reward_model = config.reward_model.model_copy(update={**common, "policy": folders["sft"]})
    prompts = [reward_model.prompts] if reward_model.prompts else []
    return _train_stage("reward_model", reward_model, [*reward_model.data, *prompts], folders, stages.reward_model)


def _ppo_and_evaluation(config: PipelineConfig, common: dict[str, Any], folders: dict[str, Path]) -> list[Stage]:
    """PPO, and the comparison that samples as PPO did."""
    rewards = [
        source.model_copy(update={"source": str(folders["reward_model"])})
        if source.source == DEFAULT_REWARD_MODEL
        else source
        for source in config.ppo.rewards
    ]
    ppo = config.ppo.model_copy(update={**common, "policy": folders["sft"], "rewards": rewards})
    evaluate = config.evaluate.model_copy(
        update={
            "seed": config.seed,
            "template": ppo.template,
            "temperature": ppo.generation.temperature,
            "prompt_length": ppo.generation.prompt_length,
            "response_length": ppo.generation.response_length,
            "policy": folders["ppo"],
            "baseline": folders["sft"],
            "reward_model": folders["reward_model"],
            "output": folders["ppo"] / "evaluation.json",
        }
    )
    return [
        Stage(
            name="ppo",
            config=ppo,
            inputs=_files([ppo.prompts]),
            folder=folders["ppo"],
            run=app.train_ppo,
            complete=app.is_complete,
        ),
        Stage(
            name="evaluate",
            config=evaluate,
            inputs=_files([evaluate.prompts]),
            folder=folders["ppo"],
            run=_evaluate,
            complete=lambda c: False,  # it ends every pipeline, and takes seconds
        ),
    ]


def _train_stage(
    name: str,
    config: Any,
    data: Iterable[Path],
    folders: dict[str, Path],
    run: Callable[[Any], Any],
) -> Stage:
    return Stage(
        name=name,
        config=config,
        inputs=_files(data),
        folder=folders[name],
        run=run,
        complete=stages.complete,
    )


def _files(paths: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(repository_path(path) for path in paths)


def _evaluate(config: EvaluateConfig) -> None:
    from rlhf_ray.evaluation.compare import compare, show

    show(compare(config), config)
    folder = repository_path(config.policy)
    if (folder / FILE_NAME).is_file():  # which has no evaluation yet
        report_run(folder, console.say)


def _stamp(stage: Stage, before: str) -> str:
    """Digest of everything that the stage's output follows from."""
    settings = stage.config.resolved(without=app.NOT_SETTINGS)
    digest = hashlib.sha256(json.dumps([stage.name, settings, before], sort_keys=True).encode())
    for path in stage.inputs:
        if not path.is_file():
            raise ValueError(f"{stage.name}: data file {path} does not exist")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _read_stamp(stage: Stage) -> str | None:
    file = stage.folder / STAMP
    return json.loads(file.read_text(encoding="utf-8")).get(stage.name) if file.is_file() else None


def _write_stamp(stage: Stage, stamp: str) -> None:
    stage.folder.mkdir(parents=True, exist_ok=True)
    replace_text(stage.folder / STAMP, json.dumps({stage.name: stamp}) + "\n")


def run_pipeline(config: PipelineConfig) -> dict[str, Path]:
    """Run every stage up to ``config.until``; returns the folder of each that is done.

    Stops, with the stage's own message said, when a stage was interrupted.
    """
    before = ""
    finished: dict[str, Path] = {}
    todo = plan(config)
    for number, stage in enumerate(todo, start=1):
        stamp = _stamp(stage, before)
        same = _read_stamp(stage) == stamp and not config.force
        if same and stage.complete(stage.config):
            console.say(f"[{number}/{len(todo)}] {stage.name}: up to date in {stage.folder}")
        else:
            console.say(f"[{number}/{len(todo)}] {stage.name}")
            _run_stage(stage, stamp, resume=same, force=config.force)
            if stage.name != "evaluate" and not stage.complete(stage.config):
                console.say(f"{stage.name} was stopped before its end; the same command goes on from there")
                return finished
        finished[stage.name] = stage.folder
        before = stamp
        if stage.name == config.until:
            break
    return finished


def _run_stage(stage: Stage, stamp: str, *, resume: bool, force: bool = False) -> None:
    """Run a stage, on from where it was interrupted or anew; a run that no pipeline made is never deleted."""
    if stage.name == "evaluate":
        stage.run(stage.config)
        return
    if not resume and stage.name != "tokenizer" and stage.folder.exists():
        if _read_stamp(stage) is None and not force:
            raise ValueError(
                f"{stage.folder} holds a run that was not made by a pipeline; take another --run, or --force to "
                "replace it"
            )
        shutil.rmtree(stage.folder)
    _write_stamp(stage, stamp)
    stage.run(stage.config)


def ensure_ppo_inputs(config: PPOConfig) -> None:
    """Train the SFT policy and the reward model first where the default ones are missing, and say so.

    Only the default places are filled, each with the stage of the preset that fits this machine; a folder that the
    user has named must exist.
    """
    defaults = PPOConfig()
    if (config.policy, config.checkpoints) != (defaults.policy, defaults.checkpoints):
        return
    needs_model = any(source.source == DEFAULT_REWARD_MODEL for source in config.reward_sources)
    wanted = "reward_model" if needs_model else "sft"
    pipeline = PipelineConfig()
    before = ""
    todo: list[tuple[Stage, str]] = []
    for stage in plan(pipeline):
        before = _stamp(stage, before)
        if not _usable(stage, before):
            todo.append((stage, before))
        elif stage.name == "sft":
            todo.clear()  # what the policy was made from is not needed any more
        if stage.name == wanted:
            break
    if todo:
        names = ", ".join(stage.name for stage, _ in todo)
        console.say(f"missing: {names}; training that first, with the preset {pipeline.preset}")
    for stage, stamp in todo:
        console.say(f"[{stage.name}]")
        _run_stage(stage, stamp, resume=_read_stamp(stage) == stamp)


def _usable(stage: Stage, stamp: str) -> bool:
    """Whether a stage's output can be built on: complete, or the user's own."""
    if stage.name == "tokenizer":
        return stage.complete(stage.config)
    return has_model(stage.folder) and (_read_stamp(stage) != stamp or stage.complete(stage.config))
