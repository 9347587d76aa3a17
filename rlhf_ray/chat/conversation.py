"""A conversation's memory: its turns, what of them still fits the model's context, and its JSON file.

Pure: no model, no terminal.  The file is ``{"messages": [...]}``, which is also a row that SFT can train on.

Left out on purpose: summarising what is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.tokenizer import Template, Tokenizer
from rlhf_ray.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the model is given of a conversation."""

    token_ids: tuple[int, ...]
    """The template's ids, up to the point where the assistant speaks."""
    dropped: int
    """Oldest messages left out."""
    cut: int
    """Characters left out at the beginning of the last message."""

    @property
    def notice(self) -> str:
        """What was left out, in words; empty when nothing was."""
        parts = [f"the {self.dropped} oldest messages"] if self.dropped else []
        parts += [f"the first {self.cut} characters of your message"] if self.cut else []
        return f"context full: the model no longer sees {' and '.join(parts)}" if parts else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A system turn, which may be empty, and the turns of user and assistant by turns; never mutated."""

    system: str = ""
    turns: tuple[Message, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """Every message, the system turn first when there is one."""
        return (*self._head, *self.turns)

    @property
    def _head(self) -> tuple[Message, ...]:
        return (Message(role="system", content=self.system),) if self.system else ()

    def asked(self, content: str) -> Conversation:
        """The conversation with one more turn of the user."""
        return self._and(Message(role="user", content=content))

    def answered(self, content: str) -> Conversation:
        """The conversation with one more turn of the assistant."""
        return self._and(Message(role="assistant", content=content))

    def _and(self, message: Message) -> Conversation:
        return Conversation(system=self.system, turns=(*self.turns, message))

    def prompt(self, tokenizer: Tokenizer, template: Template, max_length: int) -> Prompt:
        """What fits into ``max_length`` tokens of a conversation that ends with the user.

        The oldest user and assistant turns go first, together; never the system turn.  A last message that is
        too long by itself is cut from the left.  Raises ValueError when the system turn leaves no room.
        """
        assert self.turns and self.turns[-1].role == "user", "only a user's turn can be answered"
        for start in _starts(self.turns):
            ids = template.prompt_ids(tokenizer, [*self._head, *self.turns[start:]])
            if len(ids) <= max_length:
                return Prompt(token_ids=tuple(ids), dropped=start, cut=0)
        return self._cut(tokenizer, template, max_length)

    def _cut(self, tokenizer: Tokenizer, template: Template, max_length: int) -> Prompt:
        """The system turn and as much of the end of the last message as fits, found by bisection."""
        content = self.turns[-1].content

        def ids(characters: int) -> list[int]:
            last = Message(role="user", content=content[len(content) - characters :])
            return template.prompt_ids(tokenizer, [*self._head, last])

        if len(ids(0)) >= max_length:
            raise ValueError(
                f"system turn and template take {len(ids(0))} tokens, a prompt may have {max_length}; "
                "shorten the system turn, or lower max_new_tokens"
            )
        fits, too_many = 0, len(content)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if len(ids(middle)) <= max_length else (fits, middle)
        return Prompt(token_ids=tuple(ids(fits)), dropped=len(self.turns) - 1, cut=len(content) - fits)

    def save(self, path: Path) -> None:
        """Write the conversation as one JSON object."""
        messages = [{"role": message.role, "content": message.content} for message in self.messages]
        path.write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what ``save`` wrote; ValueError naming the file when it is none."""
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["messages"]
            messages = [Message(role=row["role"], content=row["content"]) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a saved conversation ({error})") from error
        if not all(isinstance(message.content, str) for message in messages):
            raise ValueError(f"{path}: not a saved conversation (a message's content is not text)")
        system = messages.pop(0).content if messages and messages[0].role == "system" else ""
        expected = ["user", "assistant"] * len(messages)
        if len(messages) % 2 or any(m.role != role for m, role in zip(messages, expected, strict=False)):
            raise ValueError(f"{path}: user and assistant must speak by turns, the user first")
        return cls(system=system, turns=tuple(messages))


def _starts(turns: Sequence[Message]) -> list[int]:
    """Where the conversation may begin: at each of the user's turns, the oldest first."""
    return [i for i, message in enumerate(turns) if message.role == "user"]
