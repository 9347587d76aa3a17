"""What a record means, recognised by its keys: one table from keys to parser for each kind of row.

The formats are those in common use: Hugging Face prompt/completion and messages, ShareGPT, Alpaca, preference
pairs as text or messages, and the transcripts of Anthropic's HH data.  A key whose value is null counts as
absent, since Parquet fills the gaps of mixed rows with nulls.

Left out on purpose: tool calls and images; a role other than system, user and assistant makes a bad row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rlhf_ray.data.fields import (
    Messages,
    Record,
    alpaca_of,
    messages_of,
    number_of,
    others,
    prompt_of,
    text_of,
    transcript_of,
    with_system,
)
from rlhf_ray.data.rows import ChatRow, PairRow, PromptRow, TextRow
from rlhf_ray.types import Message

Row = TypeVar("Row")
Table = Mapping[tuple[str, ...], Callable[[Record], Row]]


def _chat(record: Record, messages: Messages, *used: str) -> ChatRow:
    messages = with_system(record, messages)
    if all(message.role != "assistant" for message in messages):
        raise ValueError("no assistant turn to learn from")
    weight = number_of(record, "weight", 1.0, low=0.0)
    return ChatRow(messages=messages, weight=weight, fields=others(record, "system", "weight", *used))


def _reply(value: Any, name: str) -> Messages:
    """A reply given as text or as one assistant message."""
    if isinstance(value, str):
        return (Message(role="assistant", content=text_of(value, name)),)
    messages = messages_of(value, name)
    if [message.role for message in messages] != ["assistant"]:
        raise ValueError(f"{name} is not text and not a single assistant message")
    return messages


def _prompt_reply(reply: str) -> Callable[[Record], ChatRow]:
    def parser(record: Record) -> ChatRow:
        prompt = prompt_of(record["prompt"])
        if prompt[-1].role != "user":
            raise ValueError(f"prompt ends with a {prompt[-1].role} turn, expected the user's")
        return _chat(record, prompt + _reply(record[reply], reply), "prompt", reply)

    return parser


def _chat_messages(record: Record) -> ChatRow:
    return _chat(record, messages_of(record["messages"], "messages"), "messages")


def _chat_sharegpt(record: Record) -> ChatRow:
    turns = messages_of(record["conversations"], "conversations", speaker="from", said="value")
    return _chat(record, turns, "conversations")


def _chat_alpaca(record: Record) -> ChatRow:
    messages = alpaca_of(record) + _reply(record["output"], "output")
    return _chat(record, messages, "instruction", "input", "output")


# ---- pairs


def _continuation(value: Any, name: str, prompt: Messages) -> tuple[Messages, str]:
    """What a response answers, and its text; it is text, its message, or messages that repeat the prompt."""
    if isinstance(value, str):
        return prompt, text_of(value, name)
    *context, last = messages_of(value, name)
    if last.role != "assistant":
        raise ValueError(f"{name} ends with a {last.role} turn, expected the assistant's")
    before = tuple(context)
    if not prompt or not before or _same(before, prompt):
        return prompt or before, last.content
    if before[0].role == "system" and _same(before[1:], prompt):
        return before, last.content
    raise ValueError(f"{name} repeats a prompt that differs from the row's prompt")


def _same(left: Messages, right: Messages) -> bool:
    return [(m.role, m.content.strip()) for m in left] == [(m.role, m.content.strip()) for m in right]


def _pair(record: Record, prompt: Messages, *used: str) -> PairRow:
    before, chosen = _continuation(record["chosen"], "chosen", prompt)
    before_rejected, rejected = _continuation(record["rejected"], "rejected", prompt)
    if not _same(before, before_rejected):
        raise ValueError("chosen and rejected differ before the last turn")
    if not before or before[-1].role != "user":
        raise ValueError("no user turn before the responses")
    return PairRow(
        prompt=with_system(record, before),
        chosen=chosen,
        rejected=rejected,
        margin=number_of(record, "margin", 0.0),
        fields=others(record, "system", "margin", "chosen", "rejected", *used),
    )


def _pair_bare(record: Record) -> PairRow:
    """Pairs with no prompt key: message lists, or HH transcripts, that each begin with the prompt."""
    sides = {}
    for name in ("chosen", "rejected"):
        if isinstance(record[name], str):
            turns = transcript_of(record[name], name)
            sides[name] = [{"role": turn.role, "content": turn.content} for turn in turns]
    return _pair({**record, **sides}, ())


def _pair_prompt(record: Record) -> PairRow:
    return _pair(record, prompt_of(record["prompt"]), "prompt")


def _pair_alpaca(record: Record) -> PairRow:
    return _pair(record, alpaca_of(record), "instruction", "input")


# ---- prompts and text


def _prompt_row(record: Record, messages: Messages, *used: str) -> PromptRow:
    messages = with_system(record, messages)
    if messages[-1].role != "user":
        raise ValueError(f"the prompt ends with a {messages[-1].role} turn, expected the user's")
    return PromptRow(prompt=messages, fields=others(record, "system", *used))


def _prompt_text(record: Record) -> PromptRow:
    return _prompt_row(record, prompt_of(record["prompt"]), "prompt")


def _prompt_messages(record: Record) -> PromptRow:
    return _prompt_row(record, messages_of(record["messages"], "messages"), "messages")


def _prompt_alpaca(record: Record) -> PromptRow:
    return _prompt_row(record, alpaca_of(record), "instruction", "input")


def _text_row(record: Record) -> TextRow:
    return TextRow(text=text_of(record["text"], "text"), weight=number_of(record, "weight", 1.0, low=0.0))


TEXTS: Table[TextRow] = {("text",): _text_row}
CHATS: Table[ChatRow] = {
    ("messages",): _chat_messages,
    ("conversations",): _chat_sharegpt,
    ("prompt", "response"): _prompt_reply("response"),
    ("prompt", "completion"): _prompt_reply("completion"),
    ("instruction", "output"): _chat_alpaca,
}
PAIRS: Table[PairRow] = {
    ("prompt", "chosen", "rejected"): _pair_prompt,
    ("instruction", "chosen", "rejected"): _pair_alpaca,
    ("chosen", "rejected"): _pair_bare,
}
PROMPTS: Table[PromptRow] = {
    ("prompt",): _prompt_text,
    ("messages",): _prompt_messages,
    ("instruction",): _prompt_alpaca,
}


def parse(record: Any, table: Table[Row]) -> Row:
    """Turn a record into a row by the first entry of the table whose keys it has.

    Raises ValueError with the reason when no entry fits or a value is malformed.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"row is {type(record).__name__}, expected an object")
    present = {key: value for key, value in record.items() if value is not None}
    for keys, parser in table.items():
        if all(key in present for key in keys):
            return parser(present)
    known = " or ".join("{" + ", ".join(keys) + "}" for keys in table)
    raise ValueError(f"row has {{{', '.join(map(str, present))}}}, expected {known}")
