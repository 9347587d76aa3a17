"""The lint of data files: what it counts, what it complains about, and what it says before a stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.data import read_chats
from rlhf_ray.data.lint import Facts, Ruler, faults_of, kind_of, look_at
from rlhf_ray.data.lint_report import brief, complaints, leaks, overlaps, stops
from rlhf_ray.lint import main
from rlhf_ray.tokenizer import find_template, train_bpe

USER, ANSWER = {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "There."}
KINDS: list[tuple[dict[str, Any], str]] = [
    ({"text": "A document."}, "text"),
    ({"messages": [USER, ANSWER]}, "chats"),
    ({"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}]}, "chats"),
    ({"prompt": "Where?", "response": "There."}, "chats"),
    ({"prompt": "Where?", "completion": "There."}, "chats"),
    ({"instruction": "Say", "input": "it", "output": "It."}, "chats"),
    ({"prompt": "Where?", "chosen": "There.", "rejected": "No."}, "pairs"),
    ({"instruction": "Say", "input": "it", "output": "It.", "chosen": "It.", "rejected": "No."}, "pairs"),
    ({"chosen": "\n\nHuman: Where?\n\nAssistant: There.", "rejected": "\n\nHuman: Where?\n\nAssistant: No."}, "pairs"),
    ({"prompt": "Where?"}, "prompts"),
    ({"messages": [USER]}, "prompts"),
    ({"instruction": "Say", "input": "it"}, "prompts"),
]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def look(folder: Path, name: str, rows: list[dict[str, Any]], ruler: Ruler | None = None) -> Facts:
    path = write(folder, name, rows)
    return look_at(path, kind_of(path), ruler or Ruler())


@pytest.mark.parametrize(("row", "kind"), KINDS)
def test_every_format_is_told_by_its_keys_and_has_no_complaint(tmp_path: Path, row: dict[str, Any], kind: str) -> None:
    facts = look(tmp_path, "rows.jsonl", [row])
    assert (facts.kind, facts.rows, facts.bad, facts.faults) == (kind, 1, [], {})
    assert stops(facts) == complaints(facts, Ruler()) == []


def test_plain_text_is_prompts_where_its_name_says_so(tmp_path: Path) -> None:
    for name, kind, rows in (("prompts.txt", "prompts", 3), ("corpus.txt", "text", 2)):
        (tmp_path / name).write_text("one\ntwo\n\nthree\n", encoding="utf-8")
        assert kind_of(tmp_path / name) == kind
        assert look_at(tmp_path / name, kind, Ruler()).rows == rows


def test_pairs_are_counted_and_complained_about(tmp_path: Path) -> None:
    rows = [{"prompt": f"p {i}", "chosen": "a longer one", "rejected": "short"} for i in range(60)]
    rows += [{"prompt": "p 0", "chosen": "same", "rejected": "same"}, rows[0]]
    facts = look(tmp_path, "pairs.jsonl", rows)
    assert (facts.duplicates, facts.equal, facts.longer_chosen, facts.shorter_chosen) == (1, 1, 61, 0)
    assert len(facts.prompts) == 60
    said = "\n".join(complaints(facts, Ruler()))
    assert (
        "1 row (1.6%) repeat" in said and "chosen equals rejected" in said and "longer response is the chosen" in said
    )
    assert "in 100% of the pairs" in said


def test_lengths_are_in_tokens_of_the_template_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    tokenizer, template = train_bpe(["where is it there"] * 3, 262), find_template("chat")
    ruler = Ruler(tokenizer=tokenizer, template=template, limit=24)
    rows = [{"messages": [USER, ANSWER, USER, ANSWER]}, {"prompt": "w", "response": "There."}]
    facts = look(tmp_path, "chats.jsonl", rows, ruler)
    whole, _ = template.conversation_ids(tokenizer, read_chats(facts.path)[0].messages)
    assert facts.lengths["prompt"][0] + facts.lengths["response"][0] == len(whole) > 24
    assert facts.too_long == 1
    assert "1 row (50.0%) are longer than 24 tokens" in complaints(facts, ruler)[0]
    assert look_at(facts.path, "chats", Ruler()).lengths["response"] == [6, 6]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("lost \ufffd", "replacement characters"),
        ("caf\u00c3\u00a9", "text decoded as if it were cp1252"),
        ("it\u00e2\u20ac\u2122s", "text decoded as if it were cp1252"),
        ("bell\x07", "control characters"),
        ("one<br />two", "remains of HTML"),
        ("a &amp; b", "remains of HTML"),
        ("<|im_start|>user", "another template's marks"),
        ("[INST] hello", "another template's marks"),
    ],
)
def test_damaged_text_is_found(text: str, fault: str) -> None:
    assert list(faults_of(text)) == [fault]


@pytest.mark.parametrize(
    "text", ["café, naïve\tand so\r\non", "a < b & c > d", "“quoted” — it’s", "東京は、", "Привет", "Ünïcödé 👍🏽"]
)
def test_foreign_text_is_no_damage(text: str) -> None:
    assert list(faults_of(text)) == []


def test_rows_that_stop_a_stage_end_the_command_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path, "good.jsonl", [{"prompt": "a", "response": "b"}])
    bad = write(tmp_path, "bad.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": " "}])
    assert main(["check", str(good)]) == 0
    assert "nothing to complain about" in capsys.readouterr().out
    assert main(["check", str(good), str(bad)]) == 2
    out = capsys.readouterr().out
    assert "stops a stage: bad.jsonl: 1 row can't be used" in out and "bad.jsonl:2: response is empty" in out
    assert main(["check", str(bad), "--max-bad-rows", "1"]) == 0
    assert main(["check", str(write(tmp_path, "what.jsonl", [{"x": 1}]))]) == 2
    assert "what.jsonl: none of its first rows can be used: row has {x}" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "none.jsonl")]) == 2


def test_held_out_prompts_that_were_trained_on_are_found(tmp_path: Path) -> None:
    chats = look(tmp_path, "chats.jsonl", [{"prompt": f"p {i}", "response": "r"} for i in range(4)])
    pairs = look(tmp_path, "pairs.jsonl", [{"prompt": "p 1", "chosen": "c", "rejected": "r"}])
    held_out = look(tmp_path, "prompts_heldout.jsonl", [{"prompt": f"p {i}"} for i in range(2, 8)])
    assert [(a.path.name, b.path.name, n) for a, b, n in overlaps([chats, pairs, held_out])] == [
        ("chats.jsonl", "pairs.jsonl", 1),
        ("chats.jsonl", "prompts_heldout.jsonl", 2),
    ]
    (leak,) = leaks([chats, pairs, held_out])
    assert leak.startswith("2 of 6 prompts of prompts_heldout.jsonl are in chats.jsonl")


def test_a_stage_is_told_in_a_line_or_two_by_the_first_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "chats.jsonl", [{"prompt": f"p {i}", "response": "<p>hello"} for i in range(9)])
    said: list[str] = []
    brief([path, tmp_path / "none.jsonl"], "chats", Ruler(), said.append)
    assert said[0] == "lint: chats.jsonl: 9 rows of chats; characters at the median: prompt 3, response 8"
    assert said[1].startswith("lint: chats.jsonl: remains of HTML in 9 rows (100.0%), first in chats.jsonl:1")
    brief([path], "chats", Ruler(), said.append, most=4)
    assert "the first 4 rows" in said[2]


def test_the_shipped_files_are_good(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["raw/prompts.txt", "raw/prompts_heldout.txt", "sft/sft_dataset.jsonl", "preferences/pairs.jsonl"]
    assert main(["check", *(str(repository / "data" / name) for name in files), "--rows", "1000"]) == 0
    assert "nothing to complain about" in capsys.readouterr().out
