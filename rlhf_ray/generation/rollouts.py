"""Prompts and their completions as one right-padded rollout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf_ray.generation.requests import Completion
from rlhf_ray.types import Rollout


def to_rollout(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    *,
    pad_id: int,
    prompt_ids: Sequence[int],
    group_size: int = 1,
    policy_version: int = 0,
) -> Rollout:
    """Join prompts and completions (B each) into a rollout as wide as its longest row.

    ``prompt_ids`` are the prompts' numbers in their set; siblings of a group stand side by side.
    """
    lengths = [len(p) + len(c.tokens) for p, c in zip(prompts, completions, strict=True)]
    shape = (len(prompts), max(lengths))
    tokens = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    response_mask = torch.zeros(shape, dtype=torch.bool)
    rollout_logprobs = torch.zeros(shape)
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        response = slice(len(prompt), lengths[b])
        tokens[b, : lengths[b]] = torch.tensor([*prompt, *completion.tokens])
        attention_mask[b, : lengths[b]] = True
        response_mask[b, response] = True
        rollout_logprobs[b, response] = torch.tensor(completion.logprobs)
    return Rollout(
        tokens=tokens,
        attention_mask=attention_mask,
        response_mask=response_mask,
        rollout_logprobs=rollout_logprobs,
        prompt_ids=torch.tensor(prompt_ids),
        group_ids=torch.arange(len(prompts)) // group_size,
        policy_version=torch.full((len(prompts),), policy_version),
        finished=torch.tensor([completion.finished for completion in completions]),
    )
