"""The benchmarks as a person types them: help of each, and the smallest sizes of those that need nothing installed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import run_script

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = sorted(
    file.name for file in (REPOSITORY / "benchmarks").glob("*.py") if "__main__" in file.read_text(encoding="utf-8")
)


def benchmark(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark without the real corpora."""
    environment = {key: value for key, value in os.environ.items() if key != "RLHF_TEST_DATA"}
    line = [sys.executable, str(REPOSITORY / "benchmarks" / name), *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, env=environment)


def quick(name: str, folder: Path) -> dict[str, Any]:
    """The JSON of a benchmark at its smallest sizes."""
    file = folder / "figures.json"
    done = benchmark(name, "--quick", "--threads", "1", "--repetitions", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for row in content["rows"]:  # what is written is what is printed
        assert f"### {row['table']}\n" in done.stdout
    return content


def assert_ratios(spreads: list[dict[str, float]]) -> None:
    """Every one is a finite ratio above 0, within its extremes."""
    assert spreads
    for spread in spreads:
        assert 0 < spread["low"] <= spread["median"] <= spread["high"] < math.inf


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_is_measured(name: str, tmp_path: Path) -> None:
    done = run_script(REPOSITORY / "benchmarks" / name, ["--help"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}")
    assert len(done.stdout.split("\n\n")[1]) > 20  # the description


def test_generation_against_transformers(tmp_path: Path) -> None:
    content = quick("generation.py", tmp_path)
    (row,) = content["rows"]
    assert_ratios([row["ratio"]])
    assert 0 < row["ours, share of the roofline"] < math.inf
    assert content["limits"]["bytes_per_second"] > 1e8
    assert content["machine"]["threads"] == 1


def test_continuous_batching_against_the_longest_row(tmp_path: Path) -> None:
    rows = quick("ragged.py", tmp_path)["rows"]
    assert [row["way"] for row in rows] == ["continuous", "finished rows dropped", "to the longest"]
    assert_ratios([row["continuous is faster by"] for row in rows])


def test_tokenizer_against_its_peers(tmp_path: Path) -> None:
    rows = quick("tokenizer.py", tmp_path)["rows"]
    assert [row.get("library") for row in rows] == ["rlhf_ray", "tokenizers", "tiktoken", None]
    assert_ratios([row["ours is faster by"] for row in rows[:3]])


def test_fine_tuning_against_transformers(tmp_path: Path) -> None:
    rows = quick("sft.py", tmp_path)["rows"]
    assert [row[""] for row in rows] == ["ours", "transformers"]
    assert_ratios([row["ratio"] for row in rows])


def test_start_up_by_phase(tmp_path: Path) -> None:
    *helps, ppo = quick("startup.py", tmp_path)["rows"]
    assert len(helps) == len(list((REPOSITORY / "launch").glob("*.py")))
    assert all(0 < row["lowest"] <= row["seconds"] <= row["highest"] for row in helps)
    phases = [seconds for name, seconds in ppo.items() if name not in ("table", "rollout workers", "all")]
    assert sum(phases) == pytest.approx(ppo["all"]) and ppo["first_step"] > 0


def test_publishing_weights_by_every_way(tmp_path: Path) -> None:
    *steps, float32, bfloat16 = quick("weight_sync.py", tmp_path)["rows"]
    assert all(0 < row[step] < math.inf for row in steps for step in ("flatten", "digest", "copy in"))
    assert float32["MB"] == 2 * bfloat16["MB"] and float32["workers"] == 1
    for row in (float32, bfloat16):
        assert 0 < row["export"] + row["take over"] < row["store, whole"]
    columns = [f"store is faster than {side} by" for side in ("direct", "tensors")]
    assert_ratios([row[column] for row in (float32, bfloat16) for column in columns])


def test_a_controller_of_sleeping_workers(tmp_path: Path) -> None:
    *sizes, workers, paper = quick("control.py", tmp_path)["rows"][:7]
    assert [row["rows"] for row in sizes] == [8, 16, 16, 16, 16] and workers["workers"] == 1
    for row in (*sizes, workers):
        assert 0 < row["controller, CPU s"] < math.inf
    assert workers["of these nobody computes"] > 0  # nobody sleeps for less than he was asked to
    assert paper["measured"] == workers["controller, CPU s"]


def test_host_memory_as_predicted(tmp_path: Path) -> None:
    (row,) = quick("memory_plan.py", tmp_path)["rows"]
    assert (row["model"], row["role"]) == ("tiny", "run")  # one process
    assert row["predicted MB"] == pytest.approx(row["measured MB"], rel=0.25)


def test_one_base_beside_copies_of_it(tmp_path: Path) -> None:
    worker, together = quick("shared_base.py", tmp_path)["rows"]  # of tiny models, whose base is next to nothing
    assert (worker["role"], together["role"]) == ("rollout 1", "all")
    assert all(worker[way] == together[way] > 50 for way in ("copies, MB", "one base, MB"))


@pytest.mark.gpu
def test_a_preset_on_its_card(tmp_path: Path) -> None:
    (row,) = quick("gpu_memory.py", tmp_path)["rows"]
    assert row["completed"]
    assert row["predicted GB"] == pytest.approx(row["measured GB"], rel=0.1)


def test_what_watching_costs(tmp_path: Path) -> None:
    rows = quick("monitoring.py", tmp_path)["rows"]
    parts = {row["part"]: row["ms a step"] for row in rows}
    assert {"driver: terminal", "driver: doctor", "writer: samples", "all"} < parts.keys()
    assert all(cost > 0 for cost in parts.values())


def test_a_peer_that_is_not_installed_is_named(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    done = benchmark("ppo_step.py", "--quick", "--threads", "1", "--peer-python", str(bare))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "benchmarks/requirements.txt" in done.stderr
