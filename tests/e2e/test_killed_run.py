"""Runs killed by SIGKILL in each phase of a step, and started again: they end as the run that was never killed."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import run_ends
from forked import exit_code
from worlds import chats_config, make_world, ppo_config, write_chats

from rlhf_ray import app, stages
from rlhf_ray.config import Optimiser, PPOConfig, SFTConfig
from rlhf_ray.run import Run
from rlhf_ray.runtime.train_loop import TrainLoop

STEPS = 6
LAST = f"*/.tmp-step_{STEPS:06d}-*"
"""The last checkpoint, before it has its name."""
KILLS = [
    *(("generate", 10), ("judge", 15), ("learn", 5), ("publish", 5)),  # in the fifth step, which save 2 is just before
    *(("save", 2), ("open", f"{LAST}/learner.json"), ("os.rename", LAST)),  # asked for; half-written; about to be named
]
"""A phase and which of its ends is fatal; or a file operation, and which path of one is."""
STAGE_KILLS = [
    *(("step", 2, ""), ("step", 5, "")),  # before the first checkpoint; after it, or while it is written
    ("open", f"{LAST}/trainer/optimiser.json", "going on after step 3"),
    ("os.rename", LAST, "going on after step 3"),
    ("os.rename", "*/.tmp-report.json-*", "going on after step 6"),
]
"""The same, and what the run says when it is started again."""


def configuration(world: Path, name: str, **changes: Any) -> PPOConfig:
    """Six steps, a checkpoint every second one, everything switched on that has a state."""
    settings = {"max_staleness": 1, "kl": {"adaptive": True, "target": 0.5, "horizon": 50}}
    return ppo_config(world, run=name, total_steps=STEPS, save_every=2, keep=9, **settings, **changes)


def sft_configuration(world: Path, name: str) -> SFTConfig:
    """Six steps with dropout, a checkpoint every third one, which is between two lines of metrics."""
    return chats_config(
        world,
        run=name,
        dropout=0.1,
        micro_batch_size=4,
        max_steps=STEPS,
        log_every=2,
        save_every=3,
        optimiser=Optimiser(lr=1e-2),
    )


def train(config: PPOConfig | SFTConfig, phase: str | None, when: int | str) -> None:
    """A process of its own: the run, killed at the end of a phase or when it touches a file; or interrupted twice."""
    if phase is None:
        pass
    elif phase == "interrupt":
        Run.time = striking_time(Run.time, "learn", int(when), signal.SIGINT)  # type: ignore[method-assign]
        sys.addaudithook(interrupting_once(f"*/.tmp-step_{when:06d}-*/learner.json"))
    elif isinstance(when, str):
        sys.addaudithook(lambda event, arguments: event == phase and die_if(when, str(arguments[0])))
    elif phase == "step":
        TrainLoop.train_step = killing_step(TrainLoop.train_step, when)  # type: ignore[method-assign]
    else:
        Run.time = striking_time(Run.time, phase, when, signal.SIGKILL)  # type: ignore[method-assign]
    app.train_ppo(config) if isinstance(config, PPOConfig) else stages.sft(config)


def die_if(pattern: str, path: str) -> None:
    if fnmatch(path, pattern):
        os.kill(os.getpid(), signal.SIGKILL)


def killing_step(real: Callable[..., bool], last: int) -> Callable[..., bool]:
    def train_step(loop: TrainLoop, should_stop: Callable[[], bool]) -> bool:
        stop = real(loop, should_stop)
        if loop.step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return stop

    return train_step


def interrupting_once(pattern: str) -> Callable[[str, tuple[Any, ...]], None]:
    touched: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not touched and fnmatch(str(arguments[0]), pattern):
            touched.append(str(arguments[0]))
            os.kill(os.getpid(), signal.SIGINT)

    return hook


def striking_time(real: Callable[..., Any], phase: str, when: int, number: signal.Signals) -> Callable[..., Any]:
    seen = Counter[str]()

    @contextmanager
    def time(run: Run, name: str) -> Iterator[None]:
        with real(run, name):
            yield
        seen[name] += 1
        if (name, seen[name]) == (phase, when):
            os.kill(os.getpid(), number)

    return time


def in_a_process(config: PPOConfig | SFTConfig, phase: str | None = None, when: int | str = 0) -> int | None:
    """Exit code of a process with nothing of this one but its imports."""
    return exit_code(train, config, phase, when)


def end_of(config: PPOConfig) -> dict[str, Any]:
    """All that a run leaves behind."""
    return run_ends.end_of(app.run_folder(config), STEPS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    make_world(folder)
    write_chats(folder, 40)
    return folder


@pytest.fixture(scope="module")
def undisturbed(world: Path) -> dict[str, Any]:
    config = configuration(world, "undisturbed")
    assert in_a_process(config) == 0
    end = end_of(config)
    steps = list(range(1, STEPS + 1))
    assert [row["step"] for row in end["metrics"]] == steps
    assert len(end["events"]) > 20 and all([step for step, _ in tag] == steps for tag in end["events"].values())
    assert list(end["samples"]) == [f"step_{step:06d}.parquet" for step in steps]
    assert {"model.safetensors", "critic.safetensors", "learner.safetensors"} <= end["sha256"].keys()
    assert len({row["objective/kl_coef"] for row in end["metrics"]}) == STEPS, "the controller moves"
    return end


@pytest.mark.parametrize(("phase", "when"), KILLS)
def test_a_run_killed_in_any_phase_ends_as_if_nothing_had_happened(
    world: Path, undisturbed: dict[str, Any], phase: str, when: int | str
) -> None:
    config = configuration(world, f"killed-{phase}")
    assert in_a_process(config, phase, when) == -signal.SIGKILL
    folder = app.run_folder(config)
    assert not (folder / f"step_{STEPS:06d}").exists() and not app.is_complete(config)
    assert in_a_process(config) == 0
    assert "going on from" in (folder / "log.txt").read_text(encoding="utf-8")
    assert not list(folder.glob(".tmp-*")) and not list((folder / "samples").glob("*.tmp"))
    end = end_of(config)
    print(phase, {name: digest for name, digest in end["sha256"].items() if name.endswith(".safetensors")})
    assert end == undisturbed


def test_a_second_ctrl_c_while_a_run_saves_changes_nothing(world: Path, undisturbed: dict[str, Any]) -> None:
    config = configuration(world, "interrupted")
    assert in_a_process(config, "interrupt", 3) == 0  # in the third step, and again while that is written
    folder = app.run_folder(config)
    assert (folder / "latest").read_text(encoding="utf-8") == "step_000003\n"
    assert "stopped after step 3; the same command goes on" in (folder / "log.txt").read_text(encoding="utf-8")
    assert in_a_process(config) == 0
    assert end_of(config) == undisturbed


def test_a_run_on_ray_killed_ends_as_the_one_in_a_single_process(world: Path, undisturbed: dict[str, Any]) -> None:
    config = configuration(world, "killed-on-ray", num_rollout_workers=2)
    assert in_a_process(config, "learn", 5) == -signal.SIGKILL
    assert in_a_process(config) == 0
    assert end_of(config) == undisturbed


@pytest.fixture(scope="module")
def undisturbed_stage(world: Path) -> dict[str, Any]:
    config = sft_configuration(world, "undisturbed")
    assert in_a_process(config) == 0
    end = run_ends.end_of(sft_folder(config), STEPS)
    assert [row["step"] for row in end["metrics"] if "loss" in row] == [2, 4, 6]
    assert [step for step, _ in end["events"]["loss"]] == [2, 4, 6]
    assert [step for step, _ in end["events"]["eval/loss"]] == [0, 3, 6, 6]  # at last of the best model
    assert {"model.safetensors", "trainer/optimiser.safetensors", "trainer/state.json"} <= end["sha256"].keys()
    return end


def sft_folder(config: SFTConfig) -> Path:
    return config.checkpoints / "sft" / config.run


@pytest.mark.parametrize(("phase", "when", "said"), STAGE_KILLS)
def test_a_killed_stage_ends_as_if_nothing_had_happened(
    world: Path, undisturbed_stage: dict[str, Any], phase: str, when: int | str, said: str
) -> None:
    config = sft_configuration(world, f"killed-{STAGE_KILLS.index((phase, when, said))}")
    assert in_a_process(config, phase, when) == -signal.SIGKILL
    assert not stages.complete(config)
    assert in_a_process(config) == 0
    folder = sft_folder(config)
    assert said in (folder / "log.txt").read_text(encoding="utf-8") and not list(folder.glob(".tmp-*"))
    assert run_ends.end_of(folder, STEPS) == undisturbed_stage
