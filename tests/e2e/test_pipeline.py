"""The pipeline as make runs it, on the shipped data with a few steps a stage: what it skips and what it does again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.config import PipelineConfig
from rlhf_ray.pipeline import plan, run_pipeline
from rlhf_ray.run import read_metrics


def pipeline(folder: Path, **changes: Any) -> PipelineConfig:
    """A pipeline of seconds below the folder."""
    short = {"max_steps": 3, "threads": 1, "eval_every": 0, "save_every": 0, "cache": folder / "cache", "report": False}
    values: dict[str, Any] = {
        "preset": "tiny",
        "checkpoints": folder,
        "pretrain": {**short, "tokenizer": folder / "vocab", "vocab_size": 300, "batch_size": 4},
        "sft": short,
        "reward_model": {**short, "normalise_samples": 8, "response_length": 12},
        "ppo": {
            "total_steps": 2,
            "batch_size": 8,
            "num_rollout_workers": 0,
            "learner_threads": 1,
            "generation": {"response_length": 12, "prompt_length": 160},
            "ppo": {"mini_batch_size": 8, "micro_batch_size": 8},
        },
        "evaluate": {"max_prompts": 6, "examples": 2},
    }
    for section, fields in changes.items():
        values[section] = {**values[section], **fields} if isinstance(fields, dict) else fields
    return PipelineConfig(**values)


def stages_run(output: str) -> list[str]:
    """The stages that were run, not skipped."""
    lines = [line for line in output.splitlines() if line.startswith("[")]
    return [line.split("] ")[1] for line in lines if "up to date" not in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a pipeline that has run once."""
    path = tmp_path_factory.mktemp("pipeline")
    run_pipeline(pipeline(path))
    return path


def test_every_stage_leaves_a_model_that_the_next_one_reads(folder: Path) -> None:
    for place in ("pretrained", "sft", "reward_model", "ppo"):
        run = folder / place / "default"
        newest = run / (run / "latest").read_text().strip()
        assert json.loads((newest / "config.json").read_text())["n_layer"] == 4
    assert [row["step"] for row in read_metrics(folder / "ppo" / "default")] == [1, 2]
    saved = yaml.safe_load((folder / "ppo" / "default" / "config.yaml").read_text())
    assert saved["policy"] == str(folder / "sft" / "default")
    assert saved["rewards"][0]["source"] == str(folder / "reward_model" / "default")


def test_the_comparison_is_saved(folder: Path) -> None:
    comparison = json.loads((folder / "ppo" / "default" / "evaluation.json").read_text())
    assert "win_rate" in json.dumps(comparison)
    assert "Evaluation on 6 held-out prompts" in (folder / "ppo" / "default" / "report.html").read_text()


def test_what_is_up_to_date_is_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "ppo" / "default" / "metrics.jsonl").read_bytes()
    run_pipeline(pipeline(folder))
    assert stages_run(capsys.readouterr().out) == ["evaluate"]
    assert (folder / "ppo" / "default" / "metrics.jsonl").read_bytes() == before


def test_a_changed_stage_and_those_after_it_are_done_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_pipeline(pipeline(folder, reward_model={"max_steps": 4}))
    assert stages_run(capsys.readouterr().out) == ["reward_model", "ppo", "evaluate"]


def test_a_run_that_no_pipeline_made_is_not_deleted(tmp_path: Path, folder: Path) -> None:
    own = tmp_path / "sft" / "default"
    own.mkdir(parents=True)
    (own / "config.yaml").write_text("mine: true\n")
    policy = folder / "pretrained" / "default"
    with pytest.raises(ValueError, match="not made by a pipeline"):
        run_pipeline(pipeline(tmp_path, policy=policy))
    assert (own / "config.yaml").read_text() == "mine: true\n"


def test_a_given_policy_takes_the_place_of_pre_training(tmp_path: Path) -> None:
    names = [stage.name for stage in plan(pipeline(tmp_path, policy=tmp_path / "gpt2"))]
    assert names == ["sft", "reward_model", "ppo", "evaluate"]
