"""Checkpoints of a PPO run that are whole but wrong are refused by name, and damaged ones passed over."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds import make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.checkpoint import CheckpointError, load_tree, save_tree
from rlhf_ray.config import PPOConfig
from rlhf_ray.run import read_metrics
from rlhf_ray.rundir.lock import RunLock
from rlhf_ray.rundir.manifest import MANIFEST, seal
from rlhf_ray.tokenizer import train_bpe


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> PPOConfig:
    """Three steps, each with its checkpoint."""
    world = tmp_path_factory.mktemp("bad")
    make_world(world)
    config = ppo_config(world, total_steps=3, keep=9)
    app.train_ppo(config)
    return config


@pytest.fixture
def config(whole: PPOConfig, tmp_path: Path) -> PPOConfig:
    """The same run as it was after its second step, somewhere else."""
    config = whole.model_copy(update={"checkpoints": tmp_path})
    folder = app.run_folder(config)
    shutil.copytree(app.run_folder(whole), folder)
    text = (folder / "config.yaml").read_text().replace(str(whole.checkpoints), str(tmp_path))
    (folder / "config.yaml").write_text(text)
    shutil.rmtree(folder / "step_000003")
    return config


def newest(config: PPOConfig) -> Path:
    return app.run_folder(config) / "step_000002"


def reseal(folder: Path) -> None:
    """Write a manifest that fits, so that only what is in the files can be wrong."""
    (folder / MANIFEST).unlink()
    seal(folder, step=2, score=None, metric="score")


def change_json(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def truncate(folder: Path) -> None:
    path = folder / "learner.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"learner\.safetensors: truncated: \d+ bytes, \d+ were written"),
    "bit flipped": (flip_a_bit, r"model\.safetensors: altered: its SHA-256"),
    "its state cut off": (
        lambda folder: os.truncate(folder / "run.json", 9),
        r"run\.json: truncated: 9 bytes",
    ),
    "a file lost": (lambda folder: (folder / "critic.json").unlink(), r"critic\.json: missing"),
    "a file added": (lambda folder: (folder / "more.bin").write_bytes(b""), r"more\.bin: extra"),
    "duplicate key": (
        lambda folder: change_json(folder / MANIFEST, '"step": 2', '"step": 2, "step": 2'),
        r"manifest\.json: bad JSON: duplicate key 'step'",
    ),
    "another format": (
        lambda folder: change_json(folder / MANIFEST, '"format_version": 1', '"format_version": 2'),
        r"manifest\.json: format version 2 is unknown",
    ),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    whole: PPOConfig, config: PPOConfig, fault: str
) -> None:
    damage, message = DAMAGE[fault]
    damage(newest(config))
    folder = app.train_ppo(config)
    log = (folder / "log.txt").read_text()
    found = [line for line in log.splitlines() if "checkpoint refused" in line]
    assert len(found) == 1
    with pytest.raises(ValueError, match=rf"step_000002/{message}"):
        raise ValueError(found[0])
    assert "going on from" in log and "step_000001\n" in log
    names = ("objective/scores", "loss/policy_avg", "policy/grad_norm")
    first, second = (
        [[row[name] for name in names] for row in read_metrics(app.run_folder(c))] for c in (whole, config)
    )
    assert first == second and len(first) == 3


def without_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("transformer.h.1.ln_1.bias")
    save_file(tensors, path, metadata={"format": "pt"})


def with_a_tensor_more(folder: Path) -> None:
    path = folder / "critic.safetensors"
    save_file(load_file(path) | {"more": torch.zeros(1)}, path)


def change_tree(path: Path, change: Callable[[Any], Any]) -> None:
    tree = load_tree(path)
    save_tree(path, change(tree))


def with_other_moments(folder: Path) -> None:
    def change(tree: Any) -> Any:
        tree["optimiser"]["state"][3]["exp_avg"] = torch.zeros(5)
        return tree

    change_tree(folder / "learner", change)


def without_moments(folder: Path) -> None:
    def change(tree: Any) -> Any:
        del tree["optimiser"]["state"][3]
        return tree

    change_tree(folder / "learner", change)


def with_fewer_parameters(folder: Path) -> None:
    def change(tree: Any) -> Any:
        tree["optimiser"]["param_groups"][0]["params"].pop()
        return tree

    change_tree(folder / "learner", change)


def remove_tree(path: Path) -> None:
    for suffix in (".json", ".safetensors"):
        path.with_suffix(suffix).unlink()


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor missing": (without_a_tensor, r"step_000002: the tensors don't fit .*h\.1\.ln_1\.bias is missing"),
    "a tensor more": (
        with_a_tensor_more,
        r"critic\.safetensors: holds tensors that critic\.json does not name: \['more",
    ),
    "a critic of another shape": (
        lambda folder: change_tree(folder / "critic", lambda tree: tree | {"score.weight": torch.zeros(1, 9)}),
        r"critic\.safetensors does not fit this run's model: score\.weight is \[1, 9\], expected \[1, 32\]",
    ),
    "a critic with an unknown tensor": (
        lambda folder: change_tree(folder / "critic", lambda tree: tree | {"more": torch.zeros(1)}),
        r"critic\.safetensors does not fit this run's model: more is unknown",
    ),
    "moments of another shape": (
        with_other_moments,
        r"learner\.safetensors does not fit .*: the moments of parameter 3 are \(5,\), not \(",
    ),
    "moments missing": (
        without_moments,
        r"learner\.safetensors does not fit .*: the moments of parameter 3 are missing",
    ),
    "an optimiser of fewer parameters": (
        with_fewer_parameters,
        r"learner\.safetensors does not fit .*: it is of \[\d+, \d+, \d+, \d+\] parameters a group, the model has",
    ),
    "another vocabulary": (
        lambda folder: train_bpe(["other words altogether"] * 3, 270).save(folder),
        r"vocab\.json: its vocabulary is not that of this run's policy",
    ),
    "a tree of another format": (
        lambda folder: change_json(folder / "run.json", '"format_version": 1', '"format_version": 3'),
        r"run\.json: format version 3 is unknown",
    ),
    "a tree with a key twice": (
        lambda folder: change_json(folder / "learner.json", '"tree"', '"format_version": 1, "tree"'),
        r"learner\.json: bad JSON: duplicate key 'format_version'",
    ),
    "written before there were batches ahead": (
        lambda folder: remove_tree(folder / "ahead"),
        r"ahead\.json is missing: the checkpoint was written by another version of this program",
    ),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_a_checkpoint_that_does_not_fit_stops_the_run_and_says_why(config: PPOConfig, fault: str) -> None:
    """Its manifest is right, so somebody meant it: the ones before it are as wrong, and none is taken instead."""
    spoil, message = UNFIT[fault]
    spoil(newest(config))
    reseal(newest(config))
    before = json.dumps(read_metrics(app.run_folder(config)))
    with pytest.raises(ValueError, match=message) as caught:
        app.train_ppo(config)
    assert isinstance(caught.value, CheckpointError) or fault == "a tensor missing"
    assert json.dumps(read_metrics(app.run_folder(config))) == before, "nothing is taken back"


def test_a_run_whose_last_checkpoint_is_damaged_is_not_complete(whole: PPOConfig, tmp_path: Path) -> None:
    config = whole.model_copy(update={"checkpoints": tmp_path})
    shutil.copytree(app.run_folder(whole), app.run_folder(config))
    assert app.is_complete(config)
    flip_a_bit(app.run_folder(config) / "step_000003")
    assert not app.is_complete(config)


def test_a_model_that_was_replaced_since_is_not_gone_on_with(config: PPOConfig, tmp_path: Path) -> None:
    shutil.copytree(config.policy, tmp_path / "policy")
    config = config.model_copy(update={"policy": tmp_path / "policy"})
    saved = app.run_folder(config) / "config.yaml"
    saved.write_text(saved.read_text().replace(str(config.prompts.parent / "policy"), str(tmp_path / "policy")))
    path = tmp_path / "policy" / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.ln_f.bias"] += 0.1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"inputs_sha256: '[0-9a-f]{64}' -> '[0-9a-f]{64}'"):
        app.train_ppo(config)


def test_a_second_run_in_a_folder_is_turned_away(whole: PPOConfig) -> None:
    folder = app.run_folder(whole)
    with RunLock(folder):
        for changes in ({}, {"overwrite": True}):
            with pytest.raises(ValueError, match=rf'default is in use by another run .*"pid": {os.getpid()}, "host": '):
                app.train_ppo(whole.model_copy(update=changes))
    assert app.is_complete(whole)
