"""From scores to advantages: penalties, KL-shaped rewards, generalised advantage estimation.

Order and details follow Ziegler et al. 2019 (openai/lm-human-preferences) and Huang et al., "The N
Implementation Details of RLHF with PPO".  Whitening, of rewards and of advantages, is ``masked.whiten``.

Left out on purpose: gradients.  Everything here is data for the loss; call it on tensors that need none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_ray.ops.kl import kl_terms
from rlhf_ray.ops.masked import mask_out


def last_token_index(response_mask: Tensor) -> Tensor:
    """Return e (B,), int64: the last True column of response_mask (B, T), -1 in a row that has none."""
    position = torch.arange(response_mask.shape[1], dtype=torch.int32, device=response_mask.device)  # (T,)
    return torch.where(response_mask, position, -1).amax(1).long()


def replace_unfinished(scores: Tensor, finished: Tensor, penalty: float) -> Tensor:
    """Give responses without an EOS the score ``penalty``, usually negative; scores and finished are (B,)."""
    return torch.where(finished, scores, penalty)


def subtract_unfinished(scores: Tensor, finished: Tensor, penalty: float) -> Tensor:
    """Take ``penalty``, usually positive, off the scores of responses without an EOS; both are (B,)."""
    return torch.where(finished, scores, scores - penalty)


MISSING_EOS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "replace": replace_unfinished,
    "subtract": subtract_unfinished,
}


def clip_scores(scores: Tensor, limit: float) -> Tensor:
    """Clip scores (B,) to [-limit, limit]; a limit of 0 leaves them alone."""
    return scores.clamp(-limit, limit) if limit else scores


def kl_shaped_rewards(
    scores: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """Charge every response token ``kl_coef`` per nat, and add the score at the last one.

    ``scores`` is (B,), the others (B, T).  Returns rewards (B, T) and kl (B, T), the k1 estimate in nats;
    both are 0 outside the mask, and each row of rewards sums to score - kl_coef * sum(kl).  Ziegler et al.
    2019, eq. 2.
    """
    kl = kl_terms(old_logprobs, ref_logprobs, response_mask)  # (B, T)
    last = last_token_index(response_mask)[:, None]  # (B, 1)
    at_last = torch.where(last >= 0, scores[:, None], 0.0)  # (B, 1)
    return (-kl_coef * kl).scatter_add_(1, last.clamp(min=0), at_last), kl


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over the masked tokens of each row.

    delta_t = R_t + gamma * V_next - V_t and A_t = delta_t + gamma * gae_lambda * A_next, where "next" is the
    row's next token *inside* the mask, and V and A after the last one are 0.  A hole in the mask (another
    speaker's turn) is thus stepped over: the result equals that of the same tokens without it.

    All tensors are (B, T).  Returns advantages and returns = advantages + values, both (B, T) and 0 outside
    the mask.
    """
    transposed = (x.t().contiguous() for x in (rewards, values, response_mask))
    R, V, M = transposed  # (T, B): the rows of one t lie side by side, which saves time
    A = torch.zeros_like(V)  # (T, B)
    next_advantage = values.new_zeros(values.shape[0])  # (B,)
    next_value = torch.zeros_like(next_advantage)  # (B,)
    for t in reversed(M.any(1).nonzero().flatten().tolist()):
        delta = R[t] + gamma * next_value - V[t]  # (B,)
        next_advantage = torch.where(M[t], delta + gamma * gae_lambda * next_advantage, next_advantage)
        next_value = torch.where(M[t], V[t], next_value)
        A[t] = next_advantage
    advantages = A.t().contiguous()
    return mask_out(advantages, response_mask), mask_out(advantages + values, response_mask)
