"""PPO on Ray actors: the numbers of one process, errors in one line, and a run that stops when it is told to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from worlds import adapt_reward, make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.config import Memory, PPOConfig
from rlhf_ray.run import read_metrics
from rlhf_ray.runtime import cluster


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray_ppo")
    make_world(folder)
    return folder


def numbers(config: PPOConfig) -> list[dict[str, Any]]:
    """A run's metrics without what the clock says."""
    rows = read_metrics(app.run_folder(config))
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def test_any_number_of_rollout_workers_gives_the_same_rows_and_metrics(world: Path) -> None:
    changes: dict[str, Any] = {"total_steps": 2, "probes": 3}
    runs = [
        ppo_config(world, run=f"workers-{n}", num_rollout_workers=n, num_reference_workers=max(n, 1), **changes)
        for n in (0, 1, 2)
    ]
    saver = {"activation_checkpointing": True, "sleep": True, "offload_optimizer": True}
    runs[-1] = runs[-1].model_copy(update={"memory": Memory(**saver)})  # which changes no number
    for config in runs:
        app.train_ppo(config)
    alone, *others = runs
    assert [row["step"] for row in numbers(alone)] == [1, 2]
    for config in others:
        assert numbers(config) == numbers(alone)
        for kind, count in (("samples", 12), ("probes", 3)):
            for file in sorted((app.run_folder(alone) / kind).iterdir()):
                table = pyarrow.parquet.read_table(file)
                assert table.num_rows == count
                assert pyarrow.parquet.read_table(app.run_folder(config) / kind / file.name).equals(table)
        for row in read_metrics(app.run_folder(config)):
            for role in ("generator", "reward", "reference", "learner"):
                assert row[f"perf/tokens_per_second/{role}"] > 0
        memory = json.loads((app.run_folder(config) / "memory.json").read_text(encoding="utf-8"))["roles"]
        assert memory["rollout"]["processes"] == config.num_rollout_workers
        for role in ("rollout", "reward", "reference", "learner"):
            assert memory[role]["predicted"] == pytest.approx(memory[role]["measured"], rel=0.25), role


def test_adapters_give_the_same_on_two_workers_and_begin_without_kl(tmp_path: Path) -> None:
    """Their learner is the reference too; workers are sent adapters, and merge them.  Two workers, the learner and the
    reward model, itself adapters, read one copy of what is below; alone nothing is shared."""
    make_world(tmp_path)
    adapt_reward(tmp_path)
    changes: dict[str, Any] = {"total_steps": 2, "lora": {"rank": 4}}
    alone = ppo_config(tmp_path, run="lora-0", memory={"frozen": "int8", "share_base": False}, **changes)
    both = ppo_config(tmp_path, run="lora-2", memory={"frozen": "int8"}, num_rollout_workers=2, **changes)
    for config in (alone, both):
        app.train_ppo(config)
    log = (app.run_folder(both) / "log.txt").read_text(encoding="utf-8")
    assert f"rollout, learner, reward {tmp_path / 'reward'} read one copy of {tmp_path / 'policy'} in int8" in log
    memory = json.loads((app.run_folder(both) / "memory.json").read_text(encoding="utf-8"))["roles"]["base"]
    assert memory["predicted"] == pytest.approx(memory["measured"], rel=0.25)
    assert numbers(both) == numbers(alone)
    assert [row["objective/kl"] == 0.0 for row in numbers(both)] == [True, False]
    adapter = Path("step_000002", "adapter", "adapter_model.safetensors")
    assert (app.run_folder(both) / adapter).read_bytes() == (app.run_folder(alone) / adapter).read_bytes()


def test_generating_ahead_gives_the_same_on_any_number_of_workers_and_after_a_resume(world: Path) -> None:
    """With two workers from the start, to which weights are broadcast, and with one that takes up what they left."""
    changes: dict[str, Any] = {"max_staleness": 1, "total_steps": 4, "keep": 9}
    alone = ppo_config(world, run="ahead-0", **changes)
    both = ppo_config(world, run="ahead-2", num_rollout_workers=2, weight_sync="direct", **changes)
    for config in (alone, both):
        app.train_ppo(config)
    assert [row["staleness/mean"] for row in numbers(alone)] == [0.0, 1.0, 1.0, 1.0]
    assert numbers(both) == numbers(alone)
    folder = app.run_folder(both)
    for step in (3, 4):
        shutil.rmtree(folder / f"step_00000{step}")
    app.train_ppo(both.model_copy(update={"num_rollout_workers": 1}))
    log = (folder / "log.txt").read_text()
    assert "going on from" in log and "through the store" not in log
    assert numbers(both) == numbers(alone)
    for file in sorted(app.run_folder(alone).glob("step_000004/*.safetensors")):
        assert (folder / "step_000004" / file.name).read_bytes() == file.read_bytes(), file.name


def actors() -> set[str]:
    """Every actor that there has been."""
    return set(cluster.ray._private.state.actors())


def test_more_workers_than_there_are_resources_is_refused_before_any_starts(world: Path) -> None:
    config = ppo_config(world, run="many", num_rollout_workers=1000, host_memory="1000GB")
    cluster.connect(need=[])
    before = actors()
    with pytest.raises(ValueError, match=r"the cluster can't give 250\.3 CPU \(there are \d+\); ask for fewer"):
        app.train_ppo(config)
    assert actors() == before
    assert not (app.run_folder(config) / "config.yaml").exists()


def test_the_error_of_a_reward_function_arrives_as_itself(world: Path) -> None:
    (world / "moody.py").write_text(
        "def score(number, **row):\n    raise ValueError(f'row {number} has no answer field')\n", encoding="utf-8"
    )
    config = ppo_config(world, run="moody", num_rollout_workers=1, reward=[f"{world / 'moody.py'}:score"])
    with pytest.raises(ValueError, match=r"^row \d has no answer field$"):
        app.train_ppo(config)


def test_the_error_of_a_workers_constructor_arrives_as_itself_and_leaves_no_actor(world: Path) -> None:
    broken = world / "broken"
    broken.mkdir()
    for file in (world / "reward").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes((world / "reward" / "model.safetensors").read_bytes()[:-100])
    free = cluster.ray.available_resources()["CPU"]  # or more: an earlier run's actors may still go
    config = ppo_config(world, run="broken", num_rollout_workers=1, reward=[str(broken)])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        app.train_ppo(config)
    deadline = time.monotonic() + 60
    while cluster.ray.available_resources().get("CPU", 0.0) < free - 1e-6 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert cluster.ray.available_resources()["CPU"] >= free - 1e-6
    named = [actor["name"] for actor in cluster.ray.util.list_named_actors(all_namespaces=True)]
    assert not [name for name in named if name.startswith("broken: ")]


YAML = """
device: cpu
num_rollout_workers: 0
learner_threads: 1
batch_size: 12
total_steps: 400
save_every: 1000
sample_rows: 0
generation: {response_length: 10, prompt_length: 40, shard_size: 5}
ppo: {mini_batch_size: 6, micro_batch_size: 4, epochs: 2, lr: 1.0e-4}
"""


def test_ctrl_c_finishes_the_step_saves_and_the_same_command_goes_on(repository: Path, world: Path) -> None:
    """The signal goes to the whole process group, as a terminal sends it."""
    (world / "run.yaml").write_text(YAML, encoding="utf-8")
    folder = world / "checkpoints" / "ppo" / "stopped"
    words = "--config run.yaml --policy policy --reward reward --prompts prompts.jsonl --run stopped"
    line = [sys.executable, str(repository / "launch" / "ppo.py"), *words.split(), "--checkpoints", "checkpoints"]
    done = 0
    for _ in range(2):
        process = subprocess.Popen(
            line, cwd=world, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        deadline = time.monotonic() + 300
        while len(read_metrics(folder)) <= done and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "Traceback" not in err and "stopping: this step is finished and saved first" in err
        steps = [row["step"] for row in read_metrics(folder)]
        assert steps == list(range(1, len(steps) + 1)) and done < len(steps) < 400
        assert f"stopped after step {len(steps)}; the same command goes on from here" in out
        assert (folder / "latest").read_text().strip() == f"step_{len(steps):06d}"
        assert ("going on from" in out) == (done > 0)
        done = len(steps)
