"""Tokenised rows on disk: the same rows as without, made once, made again when anything about them is different."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_folders import LINES, make_policy, small_tokenizer

from rlhf_ray import stages
from rlhf_ray.config import PretrainConfig, RewardModelConfig, SFTConfig, TrainConfig
from rlhf_ray.data.cache import ROWS, RowCache
from rlhf_ray.objectives import OBJECTIVES, Dataset, Objective
from rlhf_ray.objectives.cached import cached_dataset, recipe
from rlhf_ray.run import read_metrics

NOT_ROWS = {
    *("run", "checkpoints", "resume", "allow_config_change", "overwrite", "cache", "num_workers", "device", "dtype"),
    *("threads", "epochs", "max_steps", "batch_size", "micro_batch_size", "log_every", "eval_every", "save_every"),
    *("keep", "keep_every", "mirror", "max_restarts", "compile", "optimiser", "vocab_size", "preset", "dropout"),
    *("label_smoothing", "centre_coef", "normalise_samples", "prompts", "response_length"),
    *("lora", "memory", "report", "show", "profile_step", "auto_micro_batch", "micro_batch_tokens"),
}
"""Fields that say nothing about the rows; data, tokenizer and policy count by their contents."""


@pytest.fixture
def objectives(tmp_path: Path) -> dict[str, Objective]:
    """One of each kind, on data of its own."""
    small_tokenizer().save(tmp_path / "vocab")
    make_policy(tmp_path / "policy")
    (tmp_path / "text.txt").write_text("\n\n".join(f"{line} {i}" for i, line in enumerate(LINES * 9)), encoding="utf-8")
    chats = [
        {"prompt": f"Where is {i}?", "response": f"In the valley {i * i}.", "weight": 0.3 * i} for i in range(1, 40)
    ]
    pairs = [{"prompt": f"Where is {i}?", "chosen": f"In {i}.", "rejected": "Né", "margin": i / 7} for i in range(40)]
    for name, rows in (("chats", chats), ("pairs", pairs)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    common: dict[str, Any] = {"max_length": 48, "held_out": 0.2}
    configs: dict[str, TrainConfig] = {
        "language_model": PretrainConfig(data=[tmp_path / "text.txt"], tokenizer=tmp_path / "vocab", **common),
        "sft": SFTConfig(data=[tmp_path / "chats.jsonl"], policy=tmp_path / "policy", **common),
        "reward_model": RewardModelConfig(data=[tmp_path / "pairs.jsonl"], policy=tmp_path / "policy", **common),
    }
    return {name: OBJECTIVES[name](config) for name, config in configs.items()}


def same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.tobytes() == right.tobytes()
    return type(left) is type(right) and left == right


def assert_same(left: Dataset, right: Dataset) -> None:
    assert left.counts == right.counts
    for ours, theirs in ((left.train, right.train), (left.held_out, right.held_out)):
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            assert all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("name", ["language_model", "sft", "reward_model"])
def test_rows_are_bit_identical_with_and_without_the_cache(
    name: str, objectives: dict[str, Objective], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = objectives[name]
    plain = cached_dataset(objective, None)
    made = cached_dataset(objective, tmp_path / "cache")
    monkeypatch.setattr(type(objective), "dataset", lambda self: pytest.fail("tokenised again"))
    read = cached_dataset(objective, tmp_path / "cache")
    for dataset in (made, read):
        assert_same(dataset, plain)
    first, last = plain.train[:5], plain.train[-5:]
    for rows, stored in ((first, read.train[:5]), (last, read.train[-5:])):
        batch, other = objective.collate(rows), objective.collate(stored)
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[key], other[key]) and batch[key].dtype == other[key].dtype for key in batch)
    assert plain.notes == () and "tokenised in" in made.notes[0]
    assert "read from" in read.notes[0] and " MB) instead of " in read.notes[0]


def test_rows_are_views_of_the_mapped_file(objectives: dict[str, Objective], tmp_path: Path) -> None:
    train = cached_dataset(objectives["sft"], tmp_path / "cache").train
    assert not train[0].tokens.flags.owndata and not train[0].tokens.flags.writeable
    assert train[1].tokens.ctypes.data - train[0].tokens.ctypes.data == train[0].tokens.nbytes
    assert np.shares_memory(train[0].tokens, train[0].tokens)
    (entry,) = entries(tmp_path / "cache")
    assert str(entry / ROWS) in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["language_model", "sft", "reward_model"])
def test_every_field_either_decides_what_the_rows_are_or_does_not(name: str, objectives: dict[str, Objective]) -> None:
    objective = objectives[name]
    by_content = {"data", "policy"} | ({"tokenizer"} if name == "language_model" else set())
    named = set(objective.row_options)
    assert not named & NOT_ROWS
    assert set(type(objective.config).model_fields) - NOT_ROWS - by_content == named


def test_what_the_rows_follow_from_names_the_entry(objectives: dict[str, Objective], tmp_path: Path) -> None:
    def with_config(**changes: Any) -> Objective:
        return OBJECTIVES["sft"](objectives["sft"].config.model_copy(update=changes))

    known = [recipe(with_config())]
    assert recipe(with_config(batch_size=7, epochs=9.0, run="other", dropout=0.5)) == known[0]
    for changes in (
        *({"seed": 1}, {"held_out": 0.3}, {"max_length": 40}, {"packing": False}, {"completion_only": False}),
        *({"template": "plain"}, {"max_bad_rows": 1}),
    ):
        known.append(recipe(with_config(**changes)))
    data = objectives["sft"].config.data[0]
    with data.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "One more?", "response": "Yes."}) + "\n")
    known.append(recipe(with_config()))
    small_tokenizer(270).save(tmp_path / "policy")
    known.append(recipe(with_config()))
    assert all(known[i] != known[j] for i in range(len(known)) for j in range(i))


@pytest.mark.parametrize("damage", ["cut", "altered", "missing", "no manifest"])
def test_a_damaged_entry_is_made_again(damage: str, objectives: dict[str, Objective], tmp_path: Path) -> None:
    objective = objectives["reward_model"]
    plain = cached_dataset(objective, None)
    cached_dataset(objective, tmp_path / "cache")
    (entry,) = entries(tmp_path / "cache")
    content = bytearray((entry / ROWS).read_bytes())
    if damage == "cut":
        (entry / ROWS).write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        content[len(content) // 2] ^= 1
        (entry / ROWS).write_bytes(content)
    elif damage == "missing":
        (entry / ROWS).unlink()
    else:
        (entry / "manifest.json").unlink()
    mended = cached_dataset(objective, tmp_path / "cache")
    assert_same(mended, plain)
    assert "refused" in mended.notes[0] and "tokenised again" in mended.notes[0]
    assert "read from" in cached_dataset(objective, tmp_path / "cache").notes[0]


def test_what_a_killed_process_left_is_cleared_away(objectives: dict[str, Objective], tmp_path: Path) -> None:
    objective, folder = objectives["sft"], tmp_path / "cache"
    cached_dataset(objective, folder)
    (entry,) = entries(folder)
    entry.rename(folder / f".tmp-{entry.name}")
    (folder / f".tmp-{entry.name}" / ROWS).write_bytes(b"half")
    assert_same(cached_dataset(objective, folder), cached_dataset(objective, None))
    assert [path.name for path in folder.iterdir() if path.name != ".lock"] == [entry.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    value: int


def numbers(value: int) -> Callable[[], tuple[list[Number], dict[str, Any]]]:
    return lambda: ([Number(value=value)], {"value": value})


def test_the_newest_entries_are_kept_and_deleting_is_said(tmp_path: Path) -> None:
    notes = []
    for value in range(4):
        cache = RowCache(tmp_path, keep=2)
        cache.table(f"entry{value}", numbers(value))
        notes += [note for note in cache.notes if "deleting" in note]
    assert sorted(path.name for path in entries(tmp_path)) == ["entry2", "entry3"]
    assert [f"entry{value}" in note for value, note in enumerate(notes)] == [True, True]


def test_what_making_raises_passes_through_and_nothing_is_kept(tmp_path: Path) -> None:
    def fail() -> Any:
        raise ValueError("text.txt:3: not text")

    with pytest.raises(ValueError, match="not text"):
        RowCache(tmp_path / "cache").table("entry", fail)
    assert entries(tmp_path / "cache") == []


def test_a_folder_that_takes_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cache = .*can't be written.*--cache null"):
        RowCache(tmp_path / "file" / "cache").table("entry", numbers(1))


def make_once(folder: Path, results: Any) -> None:
    def make() -> tuple[list[Number], dict[str, Any]]:
        with (folder / "made").open("a", encoding="utf-8") as file:
            file.write("once\n")
        return [Number(value=i) for i in range(1000)], {}

    table, _ = RowCache(folder / "cache").table("entry", make)
    results.put(table.num_rows)


def test_processes_that_start_together_make_an_entry_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=make_once, args=(tmp_path, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [1000] * 4
    for process in processes:
        process.join()
    assert (tmp_path / "made").read_text(encoding="utf-8") == "once\n"


def test_a_stage_learns_the_same_with_and_without_the_cache(
    objectives: dict[str, Objective], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"max_steps": 3, "batch_size": 4, "log_every": 1, "threads": 1, "device": "cpu"}
    config = objectives["sft"].config.model_copy(update={**common, "checkpoints": tmp_path / "checkpoints"})
    losses = []
    for run, cache in (("off", None), ("made", tmp_path / "cache"), ("read", tmp_path / "cache")):
        stages.sft(config.model_copy(update={"run": run, "cache": cache}))
        rows = [row for row in read_metrics(tmp_path / "checkpoints" / "sft" / run) if "loss" in row]
        losses.append([(row["loss"], row["grad_norm"]) for row in rows])
        assert all(0 <= row["perf/input_wait_seconds"] < row["time/step"] for row in rows)
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 3
    said = capsys.readouterr().out
    assert said.count("rows tokenised in") == said.count("rows read from") == 1
