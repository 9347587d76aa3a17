"""The commands as a person types them: help, and one line for whatever is wrong, with nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_script
from worlds import make_world

from rlhf_ray.tokenizer import train_bpe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command_line")
    make_world(folder)
    (folder / "small.yaml").write_text(SMALL, encoding="utf-8")
    return folder


SMALL = """
num_rollout_workers: 0
device: cpu
batch_size: 4
total_steps: 1
generation: {response_length: 6, prompt_length: 40}
ppo: {mini_batch_size: 4, micro_batch_size: 4, epochs: 1}
"""


def command(repository: Path, folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a launch script from a folder that is not the repository."""
    line = [sys.executable, str(repository / "launch" / script), *arguments]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def ppo(repository: Path, world: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """PPO in the small world, its imports done; an argument given again replaces the first."""
    given = {"--policy": "policy", "--reward": "reward", "--prompts": "prompts.jsonl", "--checkpoints": "checkpoints"}
    words = list(arguments)
    for name, value in given.items():
        words += [] if name in arguments else [name, value]
    return run_script(repository / "launch" / "ppo.py", ["--config", "small.yaml", *words], cwd=world)


def assert_refused(done: subprocess.CompletedProcess[str], world: Path, *parts: str) -> None:
    """One line that holds the parts, exit code 2, and no run."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for part in parts:
        assert part in lines[0]
    assert not (world / "checkpoints").exists()


@pytest.mark.parametrize(
    "script",
    [
        *("chat", "data", "doctor", "evaluate", "grow", "monitor", "pipeline", "plan", "ppo", "pretrain", "report"),
        *("reward_model", "sft", "tokenizer"),
    ],
)
def test_help_names_what_can_be_set(repository: Path, tmp_path: Path, script: str) -> None:
    done = command(repository, tmp_path, f"{script}.py", "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: ")
    if script not in ("data", "doctor", "report", "tokenizer"):
        assert "--config" in done.stdout and ("--seed" in done.stdout or script == "monitor")
    assert not list(tmp_path.iterdir())


def test_every_script_has_its_help_tested(repository: Path) -> None:
    scripts = {path.stem for path in (repository / "launch").glob("*.py")}
    marks = test_help_names_what_can_be_set.pytestmark
    assert scripts == set(marks[0].args[1])


# ---- what the configuration alone gives away: answered without torch


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--num-rollout-worker", "2"], ["unknown flag --num-rollout-worker", "--num-rollout-workers"]),
        (["--ppo.kl-coef", "0.1"], ["unknown flag --ppo.kl-coef"]),
        (["--ppo.lr", "fast"], ["ppo.lr", "'fast'"]),
        (["--ppo.gamma", "1.5"], ["ppo.gamma = ", "1.5", "less than or equal to 1"]),
        (["--batch-size", "4", "--ppo.mini-batch-size", "8"], ["ppo.mini_batch_size = 8", "batch_size = 4"]),
        (["--config", "missing.yaml"], ["missing.yaml does not exist"]),
    ],
)
def test_a_bad_flag_is_named(repository: Path, world: Path, arguments: list[str], parts: list[str]) -> None:
    assert_refused(ppo(repository, world, *arguments), world, *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ppo: {learning_rate: 1e-5}", ["unknown key ppo.learning_rate", "bad.yaml"]),
        ("totl_steps: 3", ["unknown key totl_steps", "total_steps"]),
        ("- a list", ["bad.yaml must hold a mapping"]),
        ("a: [1", ["bad.yaml is not YAML"]),
    ],
)
def test_a_bad_file_is_named(repository: Path, world: Path, text: str, parts: list[str]) -> None:
    (world / "bad.yaml").write_text(text, encoding="utf-8")
    assert_refused(ppo(repository, world, "--config", "bad.yaml"), world, *parts)


# ---- what the inputs give away


def test_a_malformed_prompt_is_named_by_file_and_line(repository: Path, world: Path) -> None:
    (world / "bad.jsonl").write_text('{"prompt": "fine"}\n{"prompt": 3}\n', encoding="utf-8")
    assert_refused(ppo(repository, world, "--prompts", "bad.jsonl"), world, "bad.jsonl:2: ", "max_bad_rows")


def test_an_empty_or_missing_file_of_prompts_is_named(repository: Path, world: Path) -> None:
    (world / "empty.jsonl").touch()
    assert_refused(ppo(repository, world, "--prompts", "empty.jsonl"), world, "empty.jsonl", "empty")
    assert_refused(ppo(repository, world, "--prompts", "nowhere.jsonl"), world, "nowhere.jsonl")


def test_prompts_that_are_all_too_long_are_refused(repository: Path, world: Path) -> None:
    done = ppo(repository, world, "--generation.prompt-length", "3")
    assert_refused(done, world, "none of 9 prompts has at most 3 tokens", "long_prompts")


def test_no_reward_is_refused(repository: Path, world: Path) -> None:
    (world / "none.yaml").write_text(SMALL + "rewards: []\n", encoding="utf-8")
    words = "--config none.yaml --policy policy --prompts prompts.jsonl --checkpoints checkpoints"
    done = run_script(repository / "launch" / "ppo.py", words.split(), cwd=world)
    assert_refused(done, world, "rewards is empty", "--reward")


def test_a_policy_that_is_not_there_is_refused(repository: Path, world: Path) -> None:
    assert_refused(ppo(repository, world, "--policy", "nobody"), world, "policy = nobody: no model there")


def test_a_vocabulary_that_does_not_fit_the_model_is_refused(repository: Path, world: Path) -> None:
    misfit = world / "misfit"
    misfit.mkdir()
    for file in (world / "policy").iterdir():
        (misfit / file.name).write_bytes(file.read_bytes())
    train_bpe(["quite other words, and fewer of them"] * 3, 270).save(misfit)
    done = ppo(repository, world, "--policy", "misfit")
    assert_refused(done, world, "policy = misfit: the model has 287 tokens and its vocabulary 277")


# ---- and a run that works


def test_long_prompts_are_dropped_or_cut_and_counted(repository: Path, world: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a dog"}, {"prompt": "a dog ran to the river " * 9}, {"prompt": "the cat"}]
    (world / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = ["--prompts", "long.jsonl", "--checkpoints", str(tmp_path)]
    dropped = ppo(repository, world, *settings, "--run", "dropped")
    assert dropped.returncode == 0, dropped.stderr
    assert "2 prompts (1 too long and dropped, 0 cut)" in dropped.stdout
    folder = tmp_path / "ppo" / "dropped"
    assert f"ppo: writing to {folder}" in dropped.stdout
    assert dropped.stdout.splitlines()[-1].startswith(f"next: python launch/evaluate.py --policy {folder}")
    assert (folder / "step_000001" / "model.safetensors").is_file()
    cut = ppo(repository, world, *settings, "--run", "cut", "--generation.long-prompts", "cut")
    assert cut.returncode == 0, cut.stderr
    assert "3 prompts (0 too long and dropped, 1 cut)" in cut.stdout
