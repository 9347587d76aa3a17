"""The prompts of a run: rows, and the token ids that the policy sees.

Tokenised once on the driver and sent to the workers whole, so that a rollout names its prompt by a number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlhf_ray.data.rows import PromptRow
from rlhf_ray.tokenizer import Template, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Prompts in a fixed order."""

    rows: tuple[PromptRow, ...]
    token_ids: tuple[tuple[int, ...], ...]
    """One tuple a prompt, up to the point where the assistant speaks."""
    dropped: int
    """Prompts left out because they were too long."""
    cut: int
    """Prompts that lost tokens on the left because they were too long."""

    def __len__(self) -> int:
        return len(self.rows)

    def spread(self, count: int) -> PromptSet:
        """At most ``count`` of them, evenly spread, so that a sorted file gives every kind."""
        count = min(count, len(self))
        picked = [i * len(self) // count for i in range(count)]
        return replace(
            self, rows=tuple(self.rows[i] for i in picked), token_ids=tuple(self.token_ids[i] for i in picked)
        )

    def __add__(self, other: PromptSet) -> PromptSet:
        """These prompts and then the others."""
        return PromptSet(
            rows=self.rows + other.rows,
            token_ids=self.token_ids + other.token_ids,
            dropped=self.dropped + other.dropped,
            cut=self.cut + other.cut,
        )


def tokenise_prompts(
    rows: Sequence[PromptRow],
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_length: int,
    long_prompts: Literal["drop", "cut"],
) -> PromptSet:
    """Tokenise prompts, dropping those of more than ``max_length`` tokens or cutting them from the left.

    A cut prompt keeps its first token, the beginning of the conversation.  Raises ValueError when none is left.
    """
    kept: list[PromptRow] = []
    token_ids: list[tuple[int, ...]] = []
    dropped = cut = 0
    for row in rows:
        ids = template.prompt_ids(tokenizer, row.prompt)
        if len(ids) > max_length and long_prompts == "drop":
            dropped += 1
            continue
        if len(ids) > max_length:
            cut += 1
            ids = [ids[0], *ids[len(ids) - max_length + 1 :]] if max_length > 1 else ids[-1:]
        kept.append(row)
        token_ids.append(tuple(ids))
    if not kept:
        raise ValueError(
            f"none of {len(rows)} prompts has at most {max_length} tokens; raise generation.prompt_length, or set "
            "generation.long_prompts to cut"
        )
    return PromptSet(rows=tuple(kept), token_ids=tuple(token_ids), dropped=dropped, cut=cut)
