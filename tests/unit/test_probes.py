"""Probes and samples: what is kept of a run's answers, which changes nothing in the run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from worlds import LINES, make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.config import PPOConfig
from rlhf_ray.run import read_metrics
from rlhf_ray.samples import pick, token_texts
from rlhf_ray.tokenizer import train_bpe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probes")
    make_world(folder)
    return folder


def rounds(config: PPOConfig) -> dict[str, list[dict[str, Any]]]:
    """File name -> rows of the run's probes."""
    files = sorted((app.run_folder(config) / "probes").iterdir())
    return {path.name: pyarrow.parquet.read_table(path).to_pylist() for path in files}


def measured(config: PPOConfig) -> list[dict[str, Any]]:
    rows = read_metrics(app.run_folder(config))
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def test_probes_change_nothing_and_a_resumed_run_has_each_once(world: Path) -> None:
    """Also with batches ahead, and with prompts of their own."""
    changes: dict[str, Any] = {"total_steps": 5, "max_staleness": 1, "keep": 9}
    (world / "others.jsonl").write_text('{"prompt": "a green pear", "number": 7}\n', encoding="utf-8")
    plain = ppo_config(world, run="plain", **changes)
    probed = ppo_config(
        world, run="probed", probes=3, probe_every=2, probe_prompts=world / "others.jsonl", report=True, **changes
    )
    for config in (plain, probed):
        app.train_ppo(config)
    assert measured(probed) == measured(plain)
    folder, before = app.run_folder(probed), rounds(probed)
    assert list(before) == [f"step_00000{step}.parquet" for step in (0, 2, 4, 5)]
    assert not (app.run_folder(plain) / "probes").exists() and not (app.run_folder(plain) / "report.html").exists()
    assert "a green pear" in (folder / "report.html").read_text(encoding="utf-8")
    for step in (3, 4, 5):
        shutil.rmtree(folder / f"step_00000{step}")
    app.train_ppo(probed.model_copy(update={"report": False}))
    assert rounds(probed) == before and measured(probed) == measured(plain)


def test_a_probe_holds_what_is_thought_of_every_token(world: Path) -> None:
    config = ppo_config(world, run="tokens", probes=4, total_steps=2, kl={"coef": 0.3})
    app.train_ppo(config)
    found = rounds(config)
    first, last = found["step_000000.parquet"], found["step_000002.parquet"]
    assert [row["prompt"] for row in first] == [row["prompt"] for row in last]
    numbers = [int(row["prompt"].removesuffix("<|assistant|>").split()[-1]) for row in first]
    assert numbers == [i * len(LINES) // 4 for i in range(4)]  # evenly spread
    for row in first + last:
        assert "".join(row["tokens"]) == row["response"]
        assert len(row["tokens"]) == len(row["token_kl"]) == len(row["token_value"]) == len(row["token_advantage"])
        assert row["kl"] == pytest.approx(sum(row["token_kl"]), abs=1e-5)
        assert row["finished"] == row["response"].endswith("<|eos|>")
        final = row["score"] - 0.3 * row["token_kl"][-1] - row["token_value"][-1]  # the end's reward less its value
        assert row["token_advantage"][-1] == pytest.approx(final, abs=1e-5)
    assert all(abs(kl) < 1e-5 for row in first for kl in row["token_kl"])
    assert max(abs(row["kl"]) for row in last) > 1e-3


def test_the_best_the_worst_and_some_others_are_picked() -> None:
    scores = torch.tensor([0.5, 3.0, -1.0, 0.4, 0.6, 2.0, 0.3, 0.2, 0.1, 9.0])
    assert pick(scores, 4) == {0: "random", 1: "random", 2: "worst", 9: "best"}
    assert pick(scores, 12) == {
        **dict.fromkeys((0, 3, 4, 5, 6, 7), "random"),
        1: "best",
        2: "worst",
        8: "worst",
        9: "best",
    }
    assert list(pick(scores, 2).values()) == ["random"] * 2
    assert pick(scores[:1], 8) == {0: "best"}


def test_tokens_in_words_are_the_text_when_a_character_takes_several() -> None:
    tokenizer = train_bpe(LINES, 280)
    ids = [*tokenizer.encode("é cat"), tokenizer.eos_id]
    words = token_texts(ids, tokenizer)
    assert "".join(words) == "é cat<|eos|>" and words[:2] == ["", "é"]
    assert token_texts(ids[:1], tokenizer) == ["\N{REPLACEMENT CHARACTER}"] and token_texts([], tokenizer) == []
