"""Rows of a step in words: the best, the worst and some at random, with what was thought of each.

Left out on purpose: where they are written, which the run knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.ops.kl import kl_terms
from rlhf_ray.tokenizer import StreamDecoder, Tokenizer
from rlhf_ray.types import Experience, Judged, Rollout, select

HISTOGRAM_ROWS = 1024
"""Rows of a step, which come in random order, whose spread is shown."""


def pick(scores: Tensor, count: int) -> dict[int, str]:
    """Numbers of at most ``count`` rows, in row order, with why each is shown: best, worst or random.

    An eighth of them are the best of the batch and an eighth the worst, first of all those without a score; as prompts
    come in a shuffled order, the first of the others are a random choice.
    """
    extremes = (count + 5) // 8
    order: list[int] = scores.nan_to_num(nan=-math.inf).argsort(stable=True).tolist()
    picked = dict.fromkeys(order[:extremes], "worst") | dict.fromkeys(order[::-1][:extremes], "best")
    for row in range(len(scores)):
        if len(picked) < count:
            picked.setdefault(row, "random")
    return dict(sorted(picked.items()))


def texts(rollout: Rollout, row: int, tokenizer: Tokenizer) -> tuple[str, str]:
    """Prompt and response of a row, special tokens included."""
    tokens, response = rollout.tokens[row], rollout.response_mask[row]
    parts = tokens[rollout.attention_mask[row] & ~response], tokens[response]
    prompt, answer = (tokenizer.decode(part.tolist(), skip_special=False) for part in parts)
    return prompt, answer


def token_texts(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """What each token adds to the text: nothing where a character goes on in the next one."""
    decoder = StreamDecoder(tokenizer, skip_special=False)
    pieces = [decoder.push(token) for token in ids]
    pieces[-1:] = [piece + decoder.flush() for piece in pieces[-1:]]
    return pieces


def sample_rows(judged: Judged, experience: Experience, tokenizer: Tokenizer, count: int) -> Iterator[dict[str, Any]]:
    """At most ``count`` rows of a step: KL summed over each response in nats, its mean advantage."""
    picked = pick(judged.scores, count)
    judged, experience = (select(whole, torch.tensor([*picked])) for whole in (judged, experience))
    rollout, mask = judged.rollout, judged.rollout.response_mask
    kl = kl_terms(experience.old_logprobs, judged.ref_logprobs, mask).sum(1)  # (b,)
    advantages = experience.advantages.sum(1) / mask.sum(1)
    for row, why in enumerate(picked.values()):
        prompt, response = texts(rollout, row, tokenizer)
        yield {
            "pick": why,
            "prompt": prompt,
            "response": response,
            "score": float(judged.scores[row]),
            "kl": float(kl[row]),
            "advantage": float(advantages[row]),
            "policy_version": int(rollout.policy_version[row]),
        }


def histograms(judged: Judged, experience: Experience) -> dict[str, Tensor]:
    """What TensorBoard shows the spread of: one value a response, or a token for advantages and importance weights.

    Of a step's first `HISTOGRAM_ROWS` rows, which are a random choice.
    """
    judged, experience = select(judged, slice(HISTOGRAM_ROWS)), select(experience, slice(HISTOGRAM_ROWS))
    rollout, mask = judged.rollout, judged.rollout.response_mask
    spread = {
        "scores": judged.scores,
        "kl": kl_terms(experience.old_logprobs, judged.ref_logprobs, mask).sum(1),
        "response_length": rollout.response_lengths,
        "advantages": experience.advantages[mask],
    }
    if experience.importance_weights is not None:
        spread["importance_weights"] = experience.importance_weights[mask]
    return spread
