"""From files to rows, splits, packed rows and prompt batches."""

from __future__ import annotations

from rlhf_ray.data.packing import Packed, best_fit, pack
from rlhf_ray.data.prompts import PromptBatch, PromptStream
from rlhf_ray.data.readers import read_chats, read_pairs, read_prompts, read_text
from rlhf_ray.data.rows import ChatRow, PairRow, PromptRow, TextRow
from rlhf_ray.data.splits import prompt_text, split_by_prompt

__all__ = [
    "ChatRow",
    "Packed",
    "PairRow",
    "PromptBatch",
    "PromptRow",
    "PromptStream",
    "TextRow",
    "best_fit",
    "pack",
    "prompt_text",
    "read_chats",
    "read_pairs",
    "read_prompts",
    "read_text",
    "split_by_prompt",
]
