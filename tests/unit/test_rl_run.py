"""A run of PPO in its folder: what it writes, and that an interrupted one ends as if it had not been interrupted."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from worlds import make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.checkpoint import load_tree
from rlhf_ray.config import PPOConfig
from rlhf_ray.run import read_metrics

ADAPTIVE = {"adaptive": True, "target": 0.5, "horizon": 50}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rl_run")
    make_world(folder)
    return folder


def measured(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what the clock says."""
    rows = read_metrics(folder)
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def model_files(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: policy, critic, optimiser."""
    return {
        f"{file.relative_to(checkpoint)}:{name}": tensor
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_end(one: PPOConfig, other: PPOConfig) -> None:
    first, second = app.run_folder(one), app.run_folder(other)
    assert measured(first) == measured(second)
    name = f"step_{one.total_steps:06d}"
    expected = model_files(first / name)
    found = model_files(second / name)
    assert expected.keys() == found.keys() and len(expected) > 50
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key
    assert load_tree(first / name / "run") == load_tree(second / name / "run")
    for file in sorted((first / "samples").iterdir()):
        assert pyarrow.parquet.read_table(file).equals(pyarrow.parquet.read_table(second / "samples" / file.name))


@pytest.fixture(scope="module")
def undisturbed(world: Path) -> PPOConfig:
    """Four steps in one go."""
    config = ppo_config(world, run="undisturbed", total_steps=4, keep=9, kl=ADAPTIVE)
    app.train_ppo(config)
    return config


def test_a_run_is_complete_after_its_last_step_and_not_before(world: Path, undisturbed: PPOConfig) -> None:
    assert app.is_complete(undisturbed)
    assert not app.is_complete(undisturbed.model_copy(update={"total_steps": 5}))
    assert not app.is_complete(undisturbed.model_copy(update={"run": "never"}))
    assert not (app.run_folder(undisturbed).parent / "never").exists()


def test_every_step_is_written_once_with_its_numbers(undisturbed: PPOConfig) -> None:
    rows = measured(app.run_folder(undisturbed))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["episode"] for row in rows] == [12.0, 24.0, 36.0, 48.0]
    assert [row["staleness/mean"] for row in rows] == [0.0] * 4
    for row in rows:  # every batch was sampled with the weights that learn from it
        assert row["mismatch/max"] < 1e-5
    assert rows[-1]["policy/approxkl_avg"] > 0 and abs(rows[-1]["objective/kl"]) > 1e-3  # which have moved
    beta = 0.05
    for row in rows:  # each step's beta follows from the KL of the step before it
        assert row["objective/kl_coef"] == pytest.approx(beta, rel=1e-6)
        beta *= 1 + max(-0.2, min(0.2, row["objective/kl"] / 0.5 - 1)) * 12 / 50
    assert load_tree(app.run_folder(undisturbed) / "step_000004" / "run")["tracked"]["kl"]["coef"] == pytest.approx(
        beta, rel=1e-6
    )


def test_samples_hold_what_was_said_and_thought_of_it(undisturbed: PPOConfig) -> None:
    folder = app.run_folder(undisturbed)
    rows = pyarrow.parquet.read_table(folder / "samples" / "step_000002.parquet").to_pylist()
    assert len(rows) == 12
    metrics = read_metrics(folder)[1]
    assert sum(row["score"] for row in rows) / 12 == pytest.approx(metrics["objective/scores"], abs=1e-6)
    assert sum(row["kl"] for row in rows) / 12 == pytest.approx(metrics["objective/kl"], abs=1e-6)
    for row in rows:
        assert row["step"] == 2 and row["policy_version"] == 1 and row["pick"] in ("best", "worst", "random")
        assert row["prompt"].startswith("<|bos|><|user|>") and row["prompt"].endswith("<|assistant|>")
        assert ("<|eos|>" in row["response"]) == row["response"].endswith("<|eos|>")
    ended = sum(row["response"].endswith("<|eos|>") for row in rows)
    assert ended == metrics["val/num_eos_tokens"] and 0 < ended < 12


def test_a_checkpoint_is_a_policy_that_others_can_start_from(world: Path, undisturbed: PPOConfig) -> None:
    newest = app.run_folder(undisturbed)
    config = ppo_config(world, run="second", policy=newest, total_steps=1)
    app.train_ppo(config)
    assert measured(app.run_folder(config))[0]["objective/kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_run_that_lost_its_last_steps_ends_the_same(world: Path, undisturbed: PPOConfig, critic: str) -> None:
    changes: dict[str, Any] = {"total_steps": 4, "keep": 9, "kl": ADAPTIVE}
    if critic == "shared":
        changes["ppo"] = {"critic": "shared"}
        undisturbed = ppo_config(world, run="undisturbed-shared", **changes)
        app.train_ppo(undisturbed)
    again = ppo_config(world, run=f"again-{critic}", **changes)
    source, folder = app.run_folder(undisturbed), app.run_folder(again)
    shutil.copytree(source, folder)
    (folder / "config.yaml").write_text(
        (source / "config.yaml").read_text().replace(undisturbed.run, again.run), encoding="utf-8"
    )
    for step in (3, 4):  # as after a crash in step 4: its metrics are there, its checkpoints are not
        shutil.rmtree(folder / f"step_00000{step}")
    (folder / "latest").write_text("step_000002\n", encoding="utf-8")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "half')
    app.train_ppo(again)
    assert "going on from" in (folder / "log.txt").read_text()
    assert_same_end(undisturbed, again)


STOPPING = """
import os, signal
asked = 0

def score(number, response, **row):
    global asked
    asked += 1
    if asked == {after}:
        os.kill(os.getpid(), signal.{name})
    return number % 3 + len(response)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_after_its_step_and_the_same_command_goes_on(
    world: Path, tmp_path: Path, name: str
) -> None:
    """Both runs call the same file; the second has it rewritten between its halves, as its path is a setting."""
    source = tmp_path / "score.py"
    settings: dict[str, Any] = {"reward": [f"{source}:score"], "total_steps": 4, "save_every": 100, "kl": ADAPTIVE}
    source.write_text(STOPPING.format(after=-1, name=name), encoding="utf-8")
    whole = ppo_config(world, run=f"whole-{name}", **settings)
    app.train_ppo(whole)
    halved = ppo_config(world, run=f"halved-{name}", **settings)
    source.write_text(STOPPING.format(after=17, name=name), encoding="utf-8")  # in the second step of 12 rows
    before = signal.getsignal(getattr(signal, name))
    folder = app.train_ppo(halved)
    assert signal.getsignal(getattr(signal, name)) is before
    assert (folder / "latest").read_text().strip() == "step_000002"
    assert [row["step"] for row in read_metrics(folder)] == [1, 2]
    assert "stopped after step 2; the same command goes on from here" in (folder / "log.txt").read_text()
    assert not app.is_complete(halved)
    source.write_text(STOPPING.format(after=-1, name=name), encoding="utf-8")
    app.train_ppo(halved)
    assert app.is_complete(halved)
    assert_same_end(whole, halved)


def test_a_complete_run_is_not_trained_again(undisturbed: PPOConfig) -> None:
    folder = app.run_folder(undisturbed)
    before = (folder / "metrics.jsonl").read_bytes(), (folder / "step_000004").stat().st_mtime_ns
    app.train_ppo(undisturbed)
    assert ((folder / "metrics.jsonl").read_bytes(), (folder / "step_000004").stat().st_mtime_ns) == before


def test_another_configuration_is_refused_with_its_difference(undisturbed: PPOConfig) -> None:
    changed = undisturbed.model_copy(update={"seed": 3})
    with pytest.raises(ValueError, match="seed: 0 -> 3"):
        app.train_ppo(changed)
    assert len(read_metrics(app.run_folder(undisturbed))) == 4


def test_a_run_that_failed_before_its_first_step_binds_nobody(world: Path, tmp_path: Path) -> None:
    source = tmp_path / "f.py"
    source.write_text("def f(**row):\n    return None\n", encoding="utf-8")
    config = ppo_config(world, checkpoints=tmp_path, reward=[f"{source}:f"], total_steps=1)
    with pytest.raises(ValueError, match="must return a number"):
        app.train_ppo(config)
    assert not (app.run_folder(config) / "config.yaml").exists()
    source.write_text("def f(**row):\n    return 1\n", encoding="utf-8")
    app.train_ppo(config.model_copy(update={"seed": 4}))  # another configuration, in the same folder
    assert app.is_complete(config)


def test_overwrite_deletes_only_when_the_inputs_are_good(world: Path, tmp_path: Path) -> None:
    config = ppo_config(world, checkpoints=tmp_path, total_steps=1)
    app.train_ppo(config)
    kept = (app.run_folder(config) / "metrics.jsonl").read_bytes()
    bad = config.model_copy(update={"overwrite": True, "prompts": tmp_path / "nowhere.jsonl"})
    with pytest.raises((ValueError, OSError), match=r"nowhere\.jsonl"):
        app.train_ppo(bad)
    assert (app.run_folder(config) / "metrics.jsonl").read_bytes() == kept
    app.train_ppo(config.model_copy(update={"overwrite": True, "seed": 5}))
    (row,) = read_metrics(app.run_folder(config))
    assert row["objective/scores"] != json.loads(kept)["objective/scores"]
