"""A held-out split chosen by prompt.

Whether a row is held out depends on its prompt and the seed alone: rows with equal prompts never part, and a
row stays on its side when others are added or removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from rlhf_ray.data.rows import ChatRow, PairRow, PromptRow, TextRow
from rlhf_ray.types import Message

Row = TypeVar("Row", TextRow, ChatRow, PairRow, PromptRow)


def before_last_reply(messages: Sequence[Message]) -> Sequence[Message]:
    """All of a chat that its last reply answers."""
    last = max(turn for turn, message in enumerate(messages) if message.role == "assistant")
    return messages[:last]


def prompt_text(row: TextRow | ChatRow | PairRow | PromptRow) -> str:
    """What a row answers, as one string: a document itself, all of a chat before its last reply."""
    if isinstance(row, TextRow):
        return row.text
    messages = before_last_reply(row.messages) if isinstance(row, ChatRow) else row.prompt
    return "\0".join(f"{message.role}\0{message.content}" for message in messages)


def split_by_prompt(rows: Sequence[Row], held_out_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split into (training rows, held-out rows) by a hash of each row's prompt, order kept.

    The fraction is of distinct prompts and holds on average; either side may be empty when there are few.
    Raises ValueError unless 0 <= held_out_fraction < 1.
    """
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out_fraction is {held_out_fraction}, expected at least 0 and below 1")
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        digest = hashlib.sha256(f"{seed}\0{prompt_text(row)}".encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") < held_out_fraction * 2**64
        sides[held_out].append(row)
    return sides
