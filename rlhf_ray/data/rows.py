"""The four kinds of row that training reads, whatever file format they came from.

Rows hold text; tokens appear later, when a template and a tokenizer are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """A document to model as it is."""

    text: str
    weight: float = 1.0
    """Factor on the row's loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRow:
    """A conversation with at least one assistant turn to imitate."""

    messages: tuple[Message, ...]
    weight: float = 1.0
    """Factor on the row's loss."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The row's other keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """A prompt and two responses, one preferred to the other."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float = 0.0
    """By how much the chosen response should win, in reward units."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The row's other keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """A conversation that waits for the assistant."""

    prompt: tuple[Message, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The row's other keys, for rewards that need them."""
