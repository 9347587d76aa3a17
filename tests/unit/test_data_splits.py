"""The held-out split: by prompt, stable, of about the size asked for."""

from __future__ import annotations

import pytest

from rlhf_ray.data import ChatRow, PairRow, PromptRow, TextRow, prompt_text, split_by_prompt
from rlhf_ray.types import Message


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str) -> Message:
    return Message(role="assistant", content=text)


def pairs(count: int) -> list[PairRow]:
    return [PairRow(prompt=(user(f"q{i % 500}"),), chosen=f"a{i}", rejected="b") for i in range(count)]


def test_equal_prompts_never_part() -> None:
    rows = pairs(2000)
    train, held_out = split_by_prompt(rows, 0.2, seed=1)
    assert len(train) + len(held_out) == 2000
    assert not {prompt_text(row) for row in train} & {prompt_text(row) for row in held_out}
    assert 320 <= len(held_out) <= 480  # 500 prompts: 100 expected, standard deviation 9, 4 rows each
    assert train == [row for row in rows if row in train]


def test_a_row_keeps_its_side_when_rows_are_added() -> None:
    few, more = pairs(100), pairs(450)
    assert split_by_prompt(few, 0.3, seed=0)[1] == [r for r in split_by_prompt(more, 0.3, seed=0)[1] if r in few]


def test_seed_and_bounds() -> None:
    rows = pairs(500)
    assert split_by_prompt(rows, 0.5, seed=0)[1] != split_by_prompt(rows, 0.5, seed=1)[1]
    assert split_by_prompt(rows, 0.0, seed=0) == (rows, [])
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match="held_out_fraction is"):
            split_by_prompt(rows, fraction, seed=0)


def test_the_prompt_of_each_kind_of_row() -> None:
    asked = (user("a"), assistant("b"), user("c"))
    text = prompt_text(PromptRow(prompt=asked))
    assert text == prompt_text(PairRow(prompt=asked, chosen="x", rejected="y"))
    assert text == prompt_text(ChatRow(messages=(*asked, assistant("anything"))))
    assert text == prompt_text(ChatRow(messages=(*asked, assistant("anything"), user("thanks"))))
    assert text != prompt_text(PromptRow(prompt=(user("a"), user("b"), user("c"))))
    assert prompt_text(TextRow(text="whole")) == "whole"
