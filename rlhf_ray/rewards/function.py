"""A Python function as a reward: ``--reward path/to/file.py:function``.

The function is called once a row, as ``function(prompt=..., response=..., **fields)``, and returns a number.
``prompt`` is the last user turn's text, ``fields`` holds the prompt row's other keys and ``messages``, the whole
conversation as a list of {role, content}; a key of the row that is named as one of these three is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_ray.config import RewardSource
from rlhf_ray.data.rows import PromptRow
from rlhf_ray.functions import load_function
from rlhf_ray.rewards.base import RewardContext, check_scores, response_texts
from rlhf_ray.types import Rollout


def call_fields(row: PromptRow) -> dict[str, object]:
    """The keyword arguments that stand for a prompt row."""
    messages = [{"role": message.role, "content": message.content} for message in row.prompt]
    last_user = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    return {**row.fields, "messages": messages, "prompt": last_user}


class FunctionReward:
    """Calls the user's function for every row."""

    def __init__(self, source: RewardSource, context: RewardContext, *, field: str = "reward") -> None:
        """``field`` is what mistakes are named after."""
        self.source, self.field = source.source, field
        self.function = load_function(source.source, field=field)
        self.context = context

    def __call__(self, rollout: Rollout) -> Tensor:
        """(B,) float32."""
        texts = response_texts(rollout, self.context.tokenizer)
        rows = [self.context.prompts.rows[i] for i in rollout.prompt_ids.tolist()]
        scores = [
            self._number(self.function(**{**call_fields(row), "response": text}))
            for row, text in zip(rows, texts, strict=True)
        ]
        return check_scores(torch.tensor(scores), len(rollout), self.source)

    def _number(self, score: Any) -> float:
        try:
            return float(score)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.field} {self.source} returned {score!r}; it must return a number") from error
