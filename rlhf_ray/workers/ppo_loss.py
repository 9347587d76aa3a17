"""The loss of PPO on a micro-batch: policy, value and entropy terms, with what they are watched by.

Formulas are in ``ops/losses.py``.  Left out on purpose: gradients and steps, which are the learner's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from rlhf_ray.config import PPO
from rlhf_ray.ops.losses import max_ratio, policy_diagnostics, policy_loss_terms, value_loss_terms
from rlhf_ray.ops.masked import AGGREGATIONS, masked_sum
from rlhf_ray.types import Experience
from rlhf_ray.workers.policy_critic import PolicyCritic


def ppo_loss(
    model: PolicyCritic, config: PPO, micro: Experience, denominator: Tensor, token_count: Tensor
) -> tuple[Tensor, dict[str, Tensor], tuple[float, float]]:
    """A micro-batch's share of its mini-batch's loss and metrics; its largest ratio, and that one's distance from one.

    ``denominator`` is what the mini-batch's losses are divided by, ``token_count`` how many response tokens it has.
    """
    device = model.device
    mask = micro.rollout.response_mask.to(device)
    aggregate = AGGREGATIONS[config.aggregation]
    share = denominator.to(device)
    logprobs, entropy, values = model(micro.rollout, with_entropy=config.entropy_coef > 0)
    terms = policy_loss_terms(
        logprobs,
        micro.old_logprobs.to(device),
        micro.advantages.to(device),
        mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        importance_weights=None if micro.importance_weights is None else micro.importance_weights.to(device),
    )
    assert micro.values is not None and micro.returns is not None
    value_terms = value_loss_terms(
        values,
        micro.values.to(device),
        micro.returns.to(device),
        mask,
        clip_range=config.value_clip,
    )
    policy_loss = aggregate(terms.loss, mask, denominator=share)
    value_loss = aggregate(value_terms.loss, mask, denominator=share)
    total = policy_loss + config.value_coef * value_loss
    if entropy is not None:
        total = total - config.entropy_coef * aggregate(entropy, mask, denominator=share)
    tokens = token_count.to(device)
    metrics = {
        "loss/policy_avg": policy_loss.detach(),
        "loss/value_avg": value_loss.detach(),
        "val/clipfrac_avg": masked_sum(value_terms.clipped.float(), mask) / tokens,
        **policy_diagnostics(terms, mask, denominator=tokens),
    }
    distance = float((terms.log_ratio.exp() - 1).abs().max())
    return total, metrics, (float(max_ratio(terms, mask)), distance)


def over_mini_batches(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics averaged over mini-batches, but for the largest ratio and the first one's distance from one."""
    return {
        **{name: sum(metrics[name] for metrics in history) / len(history) for name in history[0]},
        "val/ratio_max": max(metrics["val/ratio_max"] for metrics in history),
        "val/first_ratio_error": history[0]["val/first_ratio_error"],
    }
