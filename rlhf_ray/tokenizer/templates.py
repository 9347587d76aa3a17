"""How a conversation becomes tokens: one template object for SFT, reward model, PPO, evaluation and chat.

A conversation is ``<|bos|>`` and then its turns.  Each turn is an opening and its content, and an assistant's
turn is closed by ``<|eos|>``.  Openings and contents are encoded separately, so no token spans the boundary:
``prompt_ids(messages[:-1]) + response_ids(last)`` is ``conversation_ids(messages)`` exactly.  Special tokens
come from openings alone, never from content.

Left out on purpose: checks that roles alternate; the readers of data know which file and line to blame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rlhf_ray.tokenizer.bpe import Tokenizer

if TYPE_CHECKING:
    from rlhf_ray.types import Message


class Template(Protocol):
    """What every template offers."""

    @property
    def name(self) -> str:
        """Its key in TEMPLATES."""
        ...

    @property
    def jinja(self) -> str:
        """The same template in the language of Hugging Face's ``chat_template``."""
        ...

    def prompt_ids(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """Ids of the messages and of the opening of an assistant's turn."""
        ...

    def response_ids(self, tokenizer: Tokenizer, response: str) -> list[int]:
        """Ids of an assistant's answer, its closing EOS included."""
        ...

    def conversation_ids(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of the whole conversation, and True for those of assistant's content and closing EOS."""
        ...


Opening = Callable[[Tokenizer, str, str | None], list[int]]
"""(tokenizer, the turn's role, the role before it or None) -> the ids before the turn's content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnTemplate:
    """A template that differs from others in the openings of its turns alone."""

    name: str
    """Its key in TEMPLATES."""
    opening: Opening
    """Ids before a turn's content."""
    jinja: str
    """The same template in the language of Hugging Face's ``chat_template``."""

    def prompt_ids(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """Ids of the messages and of the opening of an assistant's turn."""
        ids, _ = self.conversation_ids(tokenizer, messages)
        return ids + self.opening(tokenizer, "assistant", messages[-1].role if messages else None)

    def response_ids(self, tokenizer: Tokenizer, response: str) -> list[int]:
        """Ids of an assistant's answer, its closing EOS included."""
        return [*tokenizer.encode(response), tokenizer.eos_id]

    def conversation_ids(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of the whole conversation, and True for those of assistant's content and closing EOS."""
        ids, mask = [tokenizer.bos_id], [False]
        before: str | None = None
        for message in messages:
            spoken = message.role == "assistant"
            opening = self.opening(tokenizer, message.role, before)
            content = self.response_ids(tokenizer, message.content) if spoken else tokenizer.encode(message.content)
            ids += opening + content
            mask += [False] * len(opening) + [spoken] * len(content)
            before = message.role
        return ids, mask


def _open_chat(tokenizer: Tokenizer, role: str, before: str | None) -> list[int]:
    return [tokenizer.special_tokens[f"<|{role}|>"]]


_ALPACA_HEADINGS = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}


def _open_alpaca(tokenizer: Tokenizer, role: str, before: str | None) -> list[int]:
    gap = "\n\n" if before in ("system", "user") else ""
    return tokenizer.encode(gap + _ALPACA_HEADINGS[role])


def _open_plain(tokenizer: Tokenizer, role: str, before: str | None) -> list[int]:
    return []


# `generation` marks what the assistant says, for transformers' return_assistant_tokens_mask.
_JINJA_CONTENT = (
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|eos|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}"
)
_CHAT_JINJA = (
    "{{ '<|bos|>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}" + _JINJA_CONTENT + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_ALPACA_JINJA = (
    "{% set heads = {'system': '', 'user': '### Instruction:\\n', 'assistant': '### Response:\\n'} %}"
    "{{ '<|bos|>' }}{% for m in messages %}"
    "{% if not loop.first and loop.previtem['role'] != 'assistant' %}{{ '\\n\\n' }}{% endif %}"
    "{{ heads[m['role']] }}" + _JINJA_CONTENT + "{% endfor %}{% if add_generation_prompt %}"
    "{% if messages and messages[-1]['role'] != 'assistant' %}{{ '\\n\\n' }}{% endif %}"
    "{{ heads['assistant'] }}{% endif %}"
)
_PLAIN_JINJA = "{{ '<|bos|>' }}{% for m in messages %}" + _JINJA_CONTENT + "{% endfor %}"

TEMPLATES: dict[str, Template] = {
    "chat": TurnTemplate(name="chat", opening=_open_chat, jinja=_CHAT_JINJA),
    "alpaca": TurnTemplate(name="alpaca", opening=_open_alpaca, jinja=_ALPACA_JINJA),
    "plain": TurnTemplate(name="plain", opening=_open_plain, jinja=_PLAIN_JINJA),
}


def find_template(name: str) -> Template:
    """The template of a name; ValueError naming those there are."""
    if name not in TEMPLATES:
        raise ValueError(f"template is {name!r}; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
