"""Checked values out of raw records: text, numbers, conversations, transcripts.

Every function raises ValueError with a reason that names the key; the reader adds file and line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from rlhf_ray.types import ROLES, Message

Record = Mapping[str, Any]
Messages = tuple[Message, ...]

ROLE_NAMES = {role: role for role in ROLES}
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant",
}  # fmt: skip
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def text_of(value: Any, name: str) -> str:
    """A string that can be tokenized: not blank, no half of a surrogate pair."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, expected text")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half of a surrogate pair at character {error.start}") from error
    return value


def number_of(record: Record, name: str, default: float, *, low: float = -math.inf) -> float:
    """The record's finite number of that name, or the default where it has none."""
    value = record.get(name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < low:
        bound = "" if low == -math.inf else f" of at least {low:g}"
        raise ValueError(f"{name} is {value!r}, expected a finite number{bound}")
    return float(value)


def messages_of(value: Any, name: str, *, speaker: str = "role", said: str = "content") -> Messages:
    """A conversation from a list of {role, content}; a system turn may only open it."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is {type(value).__name__}, expected a list of messages")
    if not value:
        raise ValueError(f"{name} is empty")
    names = SHAREGPT_ROLES if speaker == "from" else ROLE_NAMES
    messages = []
    for turn, item in enumerate(value, 1):
        where = f"{name} turn {turn}"
        if not isinstance(item, Mapping):
            raise ValueError(f"{where} is {type(item).__name__}, expected {{{speaker}, {said}}}")
        role = item.get(speaker)
        if not isinstance(role, str) or role not in names:
            raise ValueError(f"{where} has {speaker} {role!r}; allowed are {', '.join(names)}")
        messages.append(Message(role=names[role], content=text_of(item.get(said), f"{where}'s {said}")))
    if any(message.role == "system" for message in messages[1:]):
        raise ValueError(f"{name}: a system turn may only come first")
    return tuple(messages)


def transcript_of(value: str, name: str, *, open_end: bool = False) -> Messages:
    """The turns of a "\\n\\nHuman: ...\\n\\nAssistant: ..." text.

    open_end drops the empty assistant turn that closes a prompt of this kind.
    """
    parts = _HH_TURN.split(value.lstrip())
    if parts[0].strip() or len(parts) < 3:
        raise ValueError(f"{name} does not begin with 'Human:' or 'Assistant:'")
    turns = list(zip(parts[1::2], parts[2::2], strict=True))
    if open_end and turns[-1][0] == "Assistant" and not turns[-1][1].strip():
        turns.pop()
    return tuple(
        Message(role=HH_ROLES[who], content=text_of(said, f"{name} turn {turn}").strip())
        for turn, (who, said) in enumerate(turns, 1)
    )


def prompt_of(value: Any, name: str = "prompt") -> Messages:
    """A prompt given as text (one user turn), as an HH transcript or as messages."""
    if not isinstance(value, str):
        return messages_of(value, name)
    if value.startswith("\n\nHuman:"):
        return transcript_of(value, name, open_end=True)
    return (Message(role="user", content=text_of(value, name)),)


def alpaca_of(record: Record) -> Messages:
    """The instruction and, on the next line, its input."""
    content = text_of(record["instruction"], "instruction")
    given = record.get("input", "")
    if not isinstance(given, str):
        raise ValueError(f"input is {type(given).__name__}, expected text")
    if given.strip():
        content = f"{content}\n{text_of(given, 'input')}"
    return (Message(role="user", content=content),)


def with_system(record: Record, messages: Messages) -> Messages:
    """Prepend the record's own ``system`` key, if it has one that is not blank."""
    system = record.get("system", "")
    if isinstance(system, str) and not system.strip():
        return messages
    if messages and messages[0].role == "system":
        raise ValueError("system is given twice: as a key and as the first turn")
    return (Message(role="system", content=text_of(system, "system")), *messages)


def others(record: Record, *used: str) -> dict[str, Any]:
    """The record without the keys that were used."""
    return {key: value for key, value in record.items() if key not in used}
