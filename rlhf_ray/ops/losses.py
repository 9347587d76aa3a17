"""Per-token and per-pair loss terms, and what is measured beside them.

Functions return terms, not means: ``masked.Aggregation`` turns terms into a loss with the denominator of the
whole mini-batch, so micro-batches and ranks add up.  Masked-out inputs are replaced before any arithmetic
and change neither a loss nor a gradient, whatever they hold.

Left out on purpose: the weighted total (policy + value_coef * value - entropy_coef * entropy), which is the
learner's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_ray.ops.kl import MAX_LOG_RATIO, k2, k3
from rlhf_ray.ops.masked import EPSILON, mask_out, masked_mean, masked_sum, masked_var


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTerms:
    """The clipped surrogate of each token and what it was made of."""

    loss: Tensor
    """(B, T): differentiable; 0 outside the mask."""
    log_ratio: Tensor
    """(B, T): logpi - logpi_old, clamped, detached; 0 outside the mask."""
    clipped: Tensor
    """(B, T) bool: the clipped branch is the larger, so the token has no gradient; False outside."""


def log_importance(old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """logpi_old - logmu (B, T), clamped to +-20 and detached; 0 outside the mask.  All tensors are (B, T)."""
    log_ratio = mask_out(old_logprobs.detach() - rollout_logprobs.detach(), response_mask)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def policy_loss_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    importance_weights: Tensor | None = None,
) -> PolicyTerms:
    """PPO's clipped surrogate max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = exp(logpi - logpi_old).

    Where A < 0 the loss is at most -c A with c = ``dual_clip``; 0 turns that off, else it exceeds 1.  The loss is
    multiplied by ``importance_weights``, which get no gradient; the clipping does not see them.  All tensors are
    (B, T).
    Schulman et al. 2017, eq. 7; dual clip: Ye et al. 2020; unequal bounds: Yu et al. 2025 (DAPO); weights: Yao et
    al. 2025 (truncated importance sampling).
    """
    logprobs, old_logprobs, advantages = (mask_out(x, response_mask) for x in (logprobs, old_logprobs, advantages))
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # (B, T)
    ratio = log_ratio.exp()  # (B, T)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(unclipped, clipped)  # (B, T)
    if dual_clip:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    if importance_weights is not None:
        loss = mask_out(importance_weights.detach(), response_mask) * loss
    return PolicyTerms(loss=loss, log_ratio=log_ratio.detach(), clipped=clipped.detach() > unclipped.detach())


def policy_diagnostics(terms: PolicyTerms, response_mask: Tensor, *, denominator: Tensor | float) -> dict[str, Tensor]:
    """Measure how far the policy has moved from pi_old; scalar tensors by metric name.

    ``denominator`` is the mini-batch's token count: the results of its micro-batches and ranks add up to
    means.  With d the log-ratio and r its exponential: approxkl 0.5 d^2, update_kl r - 1 - d, clip fraction,
    and r itself.
    """
    d = terms.log_ratio
    per_token = {
        "policy/approxkl_avg": k2(d),
        "policy/update_kl": k3(-d),
        "policy/clipfrac_avg": terms.clipped.to(d.dtype),
        "val/ratio": d.exp(),
    }
    return {name: masked_sum(x, response_mask) / denominator for name, x in per_token.items()}


def max_ratio(terms: PolicyTerms, response_mask: Tensor) -> Tensor:
    """Return the largest r over response_mask (B, T), a scalar tensor, 0 for an empty mask."""
    return mask_out(terms.log_ratio.exp(), response_mask).amax()


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueTerms:
    """The value loss of each token and where it was clipped."""

    loss: Tensor
    """(B, T): differentiable; 0 outside the mask."""
    clipped: Tensor
    """(B, T) bool: the value has left the range and the clipped branch is the larger; False outside the mask."""


def value_loss_terms(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    clip_range: float = 0.2,
) -> ValueTerms:
    """0.5 max((V - ret)^2, (V_old + clip(V - V_old, -c, c) - ret)^2) with c = ``clip_range``.

    All tensors are (B, T); a range of 0 does not clip.  From openai/lm-human-preferences (Ziegler et al.
    2019), after openai/baselines' PPO2.
    """
    values, old_values, returns = (mask_out(x, response_mask) for x in (values, old_values, returns))
    unclipped = (values - returns).square()  # (B, T)
    if not clip_range:
        return ValueTerms(loss=0.5 * unclipped, clipped=torch.zeros_like(response_mask))
    move = values - old_values
    clipped = (old_values + move.clamp(-clip_range, clip_range) - returns).square()  # (B, T)
    outside = move.detach().abs() > clip_range  # inside it the branches differ by rounding alone
    return ValueTerms(
        loss=0.5 * torch.maximum(unclipped, clipped), clipped=outside & (clipped.detach() > unclipped.detach())
    )


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - MSE / Var(returns) over mask: a scalar tensor, 1 for a perfect critic, at most 0 for a constant.

    All tensors are (B, T).  Where the returns are all equal the variance is taken as 1e-8.
    """
    error = masked_mean((values - returns).square(), mask)
    return 1.0 - error / masked_var(returns, mask).clamp(min=EPSILON)


def _smoothed_logsigmoid_loss(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) logsigmoid(x) - e logsigmoid(-x), elementwise: the label is wrong with probability e."""
    return -(1.0 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def pair_loss_terms(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | float = 0.0,
    *,
    label_smoothing: float = 0.0,
    centre_coef: float = 0.0,
) -> Tensor:
    """Reward-model loss (B,): -logsigmoid(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)^2.

    ``chosen`` and ``rejected`` are rewards (B,), ``margin`` (B,) or a number, c is ``centre_coef``, which
    keeps rewards around 0.  Bradley-Terry: Stiennon et al. 2020; margin: Touvron et al. 2023 (Llama 2), eq.
    2; centring: Eisenstein et al. 2023.
    """
    loss = _smoothed_logsigmoid_loss(chosen - rejected - margin, label_smoothing)
    return loss + centre_coef * (chosen + rejected).square()


def dpo_log_ratio(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """h (B,) = (logpi_chosen - logpi_rejected) - (logref_chosen - logref_rejected).

    Each argument (B,) sums the logprobs of a completion's tokens.
    """
    return (chosen - rejected) - (ref_chosen - ref_rejected)


def dpo_loss_terms(h: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO's loss of each pair, (B,), from h (B,) of ``dpo_log_ratio`` (Rafailov et al. 2023, eq. 7)."""
    return _smoothed_logsigmoid_loss(beta * h, label_smoothing)


def ipo_loss_terms(h: Tensor, *, beta: float) -> Tensor:
    """IPO's loss of each pair, (B,): (h - 1 / (2 beta))^2 (Azar et al. 2023)."""
    return (h - 1.0 / (2.0 * beta)).square()
