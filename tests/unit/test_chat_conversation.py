"""What a conversation remembers, and what of it the model is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_folders import small_tokenizer

from rlhf_ray.chat.conversation import Conversation
from rlhf_ray.data.readers import read_chats
from rlhf_ray.tokenizer import TEMPLATES
from rlhf_ray.types import Message

CHAT = TEMPLATES["chat"]


def talk(*contents: str, system: str = "") -> Conversation:
    """Contents of the user and the assistant by turns, the user first and last."""
    conversation = Conversation(system=system)
    for turn, content in enumerate(contents):
        conversation = conversation.answered(content) if turn % 2 else conversation.asked(content)
    return conversation


def test_everything_is_shown_while_it_fits() -> None:
    tokenizer = small_tokenizer()
    conversation = talk("one", "two", "three", system="be brief")
    prompt = conversation.prompt(tokenizer, CHAT, 64)
    assert list(prompt.token_ids) == CHAT.prompt_ids(tokenizer, conversation.messages)
    assert (prompt.dropped, prompt.cut, prompt.notice) == (0, 0, "")


def test_oldest_turns_are_dropped_in_pairs_and_the_system_turn_never() -> None:
    tokenizer = small_tokenizer()
    conversation = talk("first question", "first answer", "second question", "second answer", "third", system="S")
    whole = len(CHAT.prompt_ids(tokenizer, conversation.messages))
    prompt = conversation.prompt(tokenizer, CHAT, whole - 1)
    kept = [conversation.messages[0], *conversation.turns[2:]]
    assert list(prompt.token_ids) == CHAT.prompt_ids(tokenizer, kept)
    assert prompt.dropped == 2
    assert prompt.notice == "context full: the model no longer sees the 2 oldest messages"


def test_a_too_long_message_is_cut_from_the_left() -> None:
    tokenizer = small_tokenizer()
    content = "".join(chr(ord("a") + i % 26) for i in range(200))
    prompt = talk("old", "answer", content, system="S").prompt(tokenizer, CHAT, 40)
    kept = [Message(role="system", content="S"), Message(role="user", content=content[prompt.cut :])]
    assert list(prompt.token_ids) == CHAT.prompt_ids(tokenizer, kept)
    assert 30 < len(prompt.token_ids) <= 40
    assert prompt.dropped == 2
    assert f"the first {prompt.cut} characters of your message" in prompt.notice
    longer = [kept[0], Message(role="user", content=content[prompt.cut - 1 :])]
    assert len(CHAT.prompt_ids(tokenizer, longer)) > 40


def test_a_system_turn_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"system turn and template take \d+ tokens, a prompt may have 20"):
        talk("hello", system="x" * 100).prompt(small_tokenizer(), CHAT, 20)


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(st.text(max_size=60), min_size=1, max_size=9).filter(lambda x: len(x) % 2 == 1),
    system=st.text(max_size=8),
    room=st.integers(min_value=90, max_value=140),
    template=st.sampled_from(sorted(TEMPLATES)),
)
def test_a_prompt_always_fits_and_ends_with_the_last_words(
    contents: list[str], system: str, room: int, template: str
) -> None:
    tokenizer = small_tokenizer()
    conversation = talk(*contents, system=system)
    prompt = conversation.prompt(tokenizer, TEMPLATES[template], room)
    assert len(prompt.token_ids) <= room
    assert prompt.dropped % 2 == 0
    last = Message(role="user", content=contents[-1][prompt.cut :])
    kept = [*conversation.turns[prompt.dropped : -1], last]
    head = conversation.messages[: len(conversation.messages) - len(conversation.turns)]
    assert list(prompt.token_ids) == TEMPLATES[template].prompt_ids(tokenizer, [*head, *kept])


def test_save_and_load(tmp_path: Path) -> None:
    conversation = talk("hé <|eos|>", "two\nlines", system="be brief")
    conversation.save(tmp_path / "talk.json")
    assert Conversation.load(tmp_path / "talk.json") == conversation
    assert read_chats(tmp_path / "talk.json")[0].messages == conversation.messages


def turn(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a saved conversation"),
        ("[]", "not a saved conversation"),
        ("{}", "not a saved conversation"),
        (json.dumps({"messages": [turn("poet", "x")]}), "message role is 'poet'"),
        (json.dumps({"messages": [turn("user", 3), turn("assistant", "x")]}), "content is not text"),
        (json.dumps({"messages": [turn("user", "x")]}), "by turns"),
        (json.dumps({"messages": [turn("assistant", "x"), turn("user", "x")]}), "by turns"),
        (json.dumps({"messages": [turn("user", "x"), turn("system", "x")]}), "by turns"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        Conversation.load(file)
    assert str(file) in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json: no such file"):
        Conversation.load(tmp_path / "nowhere.json")
