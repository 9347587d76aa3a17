"""Training on Ray workers: the result of one process, whatever dies on the way."""

from __future__ import annotations

import gzip
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "unit"))

from small_folders import make_policy
from worlds import chats_config, write_chats

from rlhf_ray import stages
from rlhf_ray.config import Optimiser, SFTConfig
from rlhf_ray.run import read_metrics
from rlhf_ray.runtime import train as runtime

STEPS = 240


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> SFTConfig:
    folder = tmp_path_factory.mktemp("train")
    make_policy(folder / "policy")
    write_chats(folder, 40)
    return chats_config(
        folder,
        num_workers=2,
        micro_batch_size=2,
        max_steps=STEPS,
        save_every=10,
        # A bias of attention's keys has no gradient but rounding errors, which a smaller eps would blow up.
        optimiser=Optimiser(lr=3e-3, eps=1e-4, schedule="constant"),
    )


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def run_folder(config: SFTConfig) -> Path:
    return config.checkpoints / "sft" / config.run


def once_saved(config: SFTConfig, act: Callable[[Path], None]) -> threading.Thread:
    """Act on the run's folder, in the background, as soon as it has a checkpoint."""

    def watch() -> None:
        folder = run_folder(config)
        while not (folder / "latest").is_file():
            time.sleep(0.002)
        act(folder)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def undisturbed(config: SFTConfig) -> Path:
    """The newest checkpoint of a run on two workers."""
    stages.sft(config.model_copy(update={"run": "two", "profile_step": 3}))
    return run_folder(config).with_name("two") / f"step_{STEPS:06d}"


def test_two_workers_give_the_weights_of_one_process(config: SFTConfig, undisturbed: Path) -> None:
    alone = config.model_copy(update={"run": "alone", "num_workers": 0})
    stages.sft(alone)
    expected = weights(run_folder(alone) / undisturbed.name)
    for name, tensor in weights(undisturbed).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)
    first, second = ({r["step"]: r["eval/loss"] for r in read_metrics(f) if "eval/loss" in r}
                     for f in (run_folder(alone), undisturbed.parent))  # fmt: skip
    assert first == pytest.approx(second, abs=1e-5)
    assert not (undisturbed.parent / runtime.RAY_TRAIN).exists()
    with gzip.open(undisturbed.parent / "trace" / "step_000003.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    lanes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert [lanes[pid] for pid in sorted({e["pid"] for e in events if e["name"] == "gradient"})] == ["rank 0", "rank 1"]


def test_a_killed_worker_is_replaced_sigterm_reaches_all_and_neither_changes_anything(
    config: SFTConfig, undisturbed: Path
) -> None:
    config = config.model_copy(update={"run": "disturbed"})
    log = run_folder(config) / "log.txt"

    def kill_and_stop(folder: Path) -> None:
        os.kill(json.loads((folder / ".lock").read_text())["pid"], signal.SIGKILL)
        while "going on after step" not in log.read_text():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = once_saved(config, kill_and_stop)
    with pytest.raises(runtime.Interrupted, match="run the same command again"):
        stages.sft(config)
    thread.join(timeout=60)
    newest = (run_folder(config) / "latest").read_text().strip()
    assert newest < undisturbed.name and not stages.complete(config)
    stages.sft(config)
    assert stages.complete(config) and log.read_text().count("going on after step") == 2
    expected = weights(undisturbed)
    for name, tensor in weights(run_folder(config) / undisturbed.name).items():
        assert torch.equal(tensor, expected[name]), name


def test_bad_data_ends_at_once_with_its_reason(config: SFTConfig) -> None:
    path = config.data[0].with_name("bad.jsonl")
    path.write_text('{"prompt": 3}\n', encoding="utf-8")
    bad = config.model_copy(update={"run": "bad", "data": [path]})
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: "):
        stages.sft(bad)
    assert not run_folder(bad).exists()


def test_more_workers_than_there_are_resources_is_refused(config: SFTConfig) -> None:
    many = config.model_copy(update={"run": "many", "num_workers": 1000, "batch_size": 1000})
    with pytest.raises(ValueError, match="the cluster can't give 500 CPU"):
        stages.sft(many)
    assert not run_folder(many).exists()
