"""Proximal policy optimisation from a reward and a KL penalty (Schulman et al. 2017; Ziegler et al. 2019).

    prompts -> generator -> rollouts -+-> reward ----> scores -------+
                                      +-> reference -> ref_logprobs -+-> credit -> experience -> learner -> weights
                                      +-> learner ---> old_logprobs -+                                        |
                                                       values        |                  generator <-----------+

A shard of rollouts is judged as soon as it is generated, while other shards are still under way.  With
``max_staleness`` = k > 0 the batches of the next k steps are generated and judged while this one is learned from; their
rows come from a policy k updates old, for which truncated importance weights make up (Yao et al. 2025).

Left out on purpose: who computes and where (roles), and what is written down (the run).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_ray.config import KL, PPO, PPOConfig
from rlhf_ray.ops.advantages import MISSING_EOS, clip_scores, gae, kl_shaped_rewards
from rlhf_ray.ops.kl import AdaptiveKL, FixedKL, KLController, k3, raised, sequence_kl
from rlhf_ray.ops.losses import explained_variance, log_importance
from rlhf_ray.ops.masked import masked_mean, masked_var, response_columns, whiten
from rlhf_ray.ops.repetition import distinct_rows, repeated_ngrams
from rlhf_ray.roles import Roles, Run, gather
from rlhf_ray.types import Experience, Judged, Rollout, Shards, columns, select

FIRST_KL_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
"""Nats per sequence between two copies of one policy: rounding alone."""

KEPT_KL_TOLERANCE = {"float32": 0.0, "bfloat16": 0.5, "int8": 5.0, "int4": 20.0}
"""The same where the reference's weights are kept in fewer bits, and the KL is measured from what they have become."""

FIRST_MISMATCH_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
"""Nats per token, on average, between the generator's log-probabilities and the learner's, of one policy."""

LOOKED_THROUGH = 512
"""Rows of a batch that are looked through for repetition, the costliest of the metrics.

A mean of values in [0, 1] over so many rows has a standard error of at most 0.022.
"""


def kl_controller(config: KL) -> KLController:
    """The controller that the configuration asks for."""
    if config.adaptive:
        return AdaptiveKL(config.coef, target=config.target, horizon=config.horizon)
    return FixedKL(config.coef)


def train(config: PPOConfig, roles: Roles, run: Run) -> None:
    """Train until the run's steps are done or it is asked to stop.

    Raises ValueError when the first rollouts show that policy, reference and generator are not the same model, or that
    the reward has no opinion.
    """

    def judge(rollouts: Shards[Rollout]) -> tuple[Shards[Tensor], Shards[Tensor]]:
        return roles.reward.score(rollouts), roles.reference.logprobs(rollouts)

    controller = run.track("kl", kl_controller(config.kl))
    roles.generator.update_weights(roles.learner.weights(run.first_step))
    # 1. act; 2. judge: three calls, all in flight while shards are still being generated
    for step, rollouts, (scores, ref_logprobs) in run.rollouts(roles.generator, judge):
        with run.time("judge"):
            evaluation = roles.learner.evaluate(rollouts)  # by the policy that learns, whoever sampled
        with run.time("generate"):
            rollout = gather(rollouts)
        with run.time("judge"):
            judged = Judged(
                rollout=rollout,
                scores=gather(scores),
                ref_logprobs=gather(ref_logprobs),
                evaluation=gather(evaluation),
            )
        if step == 0:
            check_first_kl(judged, first_kl_tolerance(config))
            coarser = min(config.ppo.dtype, config.generation.dtype)  # bfloat16 when either is
            check_first_mismatch(judged, coarser)
            check_first_scores(judged)
        coef = raised(controller.coef, config.kl.rollback_factor, run.rollbacks)
        check_staleness(rollout, step, config.max_staleness)
        with run.time("credit"):  # 3. credit
            experience, credited = credit(config.ppo, judged, coef)
            if config.max_staleness:
                experience, corrected = correct(experience, config.ppo.importance_cap)
                credited |= corrected
        if config.memory.sleep:
            for idle in (roles.reward, roles.reference, *([] if config.max_staleness else [roles.generator])):
                idle.sleep()
        with run.time("learn"):  # 4. learn
            learned = roles.learner.update(learnable(experience, judged.scores)).result()
        if config.memory.sleep:
            roles.learner.sleep()
        with run.time("publish"):  # 5. publish
            roles.generator.update_weights(roles.learner.weights(step + 1))
        if math.isfinite(credited["objective/kl"]):
            controller.update(credited["objective/kl"], len(rollout))
        run.end_step(step, judged, experience, {**credited, **learned})


def first_kl_tolerance(config: PPOConfig) -> float:
    """Nats per sequence that may lie between the policy that begins and the reference.

    With adapters the reference is the policy's own base, in however many bits.
    """
    kept = "float32" if config.lora.rank else config.memory.frozen
    return max(FIRST_KL_TOLERANCE[config.ppo.dtype], KEPT_KL_TOLERANCE[kept])


def check_first_kl(judged: Judged, tolerance: float) -> None:
    """Raise ValueError unless policy and reference agree on the first batch, as two copies of one model do."""
    kl = sequence_kl(judged.evaluation.old_logprobs, judged.ref_logprobs, judged.rollout.response_mask)
    worst = float(kl.abs().max())
    if not worst <= tolerance:
        raise ValueError(
            f"at step 0 policy and reference differ by {worst:.3g} nats in a sequence (allowed: {tolerance:g}): they "
            "are not the same model, or one of them has dropout on; refusing to train"
        )


def check_first_mismatch(judged: Judged, dtype: str) -> None:
    """Raise ValueError unless the generator sampled the first batch with the learner's policy."""
    rollout = judged.rollout
    distance = (rollout.rollout_logprobs - judged.evaluation.old_logprobs).abs()
    mismatch = float(masked_mean(distance, rollout.response_mask))
    if not mismatch <= FIRST_MISMATCH_TOLERANCE[dtype]:
        raise ValueError(
            f"at step 0 generator and learner differ by {mismatch:.3g} nats a token, which must be 0: they do not hold "
            "the same weights or divide by another temperature; refusing to train"
        )


def check_first_scores(judged: Judged) -> None:
    """Raise ValueError when no answer of the first batch has a finite score."""
    if not bool(judged.scores.isfinite().any()):
        raise ValueError(
            f"at step 0 none of the {len(judged.scores)} scores is a finite number, the first is "
            f"{judged.scores[0].item()}: mend the reward; refusing to train"
        )


def check_staleness(rollout: Rollout, step: int, limit: int) -> None:
    """AssertionError when a row was sampled more than ``limit`` updates ago, or by a policy that is yet to come."""
    staleness = step - rollout.policy_version
    assert int(staleness.min()) >= 0 and int(staleness.max()) <= limit, f"staleness {staleness.tolist()}, limit {limit}"


def scored(scores: Tensor) -> Tensor:
    """Which rows (B,) have a finite score, and are learned from; all where none has one, which the learner skips."""
    finite = scores.isfinite()
    return finite if bool(finite.any()) else torch.ones_like(finite)


def learnable(experience: Experience, scores: Tensor) -> Experience:
    """The rows that are learned from, by the scores (B,) of all."""
    rows = scored(scores)
    learned: Experience = experience if bool(rows.all()) else select(experience, rows)
    return learned


def shape_scores(config: PPO, scores: Tensor, finished: Tensor) -> Tensor:
    """Scores (B,) after the penalty for responses (B,) that did not finish, and clipping."""
    if config.missing_eos_penalty is not None:
        scores = MISSING_EOS[config.missing_eos](scores, finished, config.missing_eos_penalty)
    if config.score_clip:
        scores = clip_scores(scores, config.score_clip)
    return scores


def credit(config: PPO, judged: Judged, kl_coef: float) -> tuple[Experience, dict[str, float]]:
    """From scores to advantages: KL-shaped rewards, GAE and whitening over the whole batch; and its metrics.

    A row whose score is not finite counts for nothing in what comes from scores, and its own returns are not finite.
    """
    width, responses = judged.rollout.tokens.shape[1], response_columns(judged.rollout.response_mask)
    near = columns(judged, responses)  # what lies outside is prompts and padding
    mask, old_logprobs, values = near.rollout.response_mask, near.evaluation.old_logprobs, near.evaluation.values
    assert values is not None, "PPO needs a critic"
    rows = scored(judged.scores)
    counted = mask & rows[:, None]
    scores = shape_scores(config, judged.scores, judged.rollout.finished)
    rewards, kl = kl_shaped_rewards(scores, old_logprobs, near.ref_logprobs, mask, kl_coef)  # (B, T) each
    if config.whiten_rewards:
        rewards = whiten(rewards, counted, keep_mean=True)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)
    whitened = whiten(advantages, counted) if config.whiten_advantages else advantages
    outside = responses.start, width - responses.stop
    experience = Experience(
        rollout=judged.rollout,
        old_logprobs=judged.evaluation.old_logprobs,
        advantages=pad(whitened, outside),
        values=judged.evaluation.values,
        returns=pad(returns, outside),
    )
    metrics = {
        "objective/rlhf_reward": (scores - kl_coef * kl.sum(1))[rows].mean(),
        "objective/kl": kl.sum(1).mean(),
        "objective/kl_k3": k3(kl).sum(1).mean(),
        "objective/kl_coef": torch.tensor(kl_coef),
        "val/explained_variance": explained_variance(values, returns, counted),
        "val/value_mean": masked_mean(values, mask),
        "val/return_mean": masked_mean(returns, counted),
        "val/advantage_std": masked_var(advantages, counted).sqrt(),
        **describe(near, rows),
    }
    return experience, {name: float(value) for name, value in metrics.items()}


def describe(judged: Judged, rows: Tensor) -> dict[str, Tensor]:
    """What a batch's responses are like, whatever they are given credit for; scores are those of some ``rows`` (B,)."""
    rollout, evaluation, mask = judged.rollout, judged.evaluation, judged.rollout.response_mask
    finished, lengths = rollout.finished.float(), rollout.response_lengths.float()
    mismatch = (rollout.rollout_logprobs - evaluation.old_logprobs).abs()
    scores = judged.scores[rows]
    some = rollout.tokens[:LOOKED_THROUGH], mask[:LOOKED_THROUGH]
    return {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(correction=0),
        "objective/unscored": (~judged.scores.isfinite()).sum(),
        "objective/entropy": masked_mean(evaluation.entropy, mask),
        "objective/eos_rate": finished.mean(),
        "val/num_eos_tokens": finished.sum(),
        "response_length/mean": lengths.mean(),
        "response_length/max": lengths.max(),
        "response/repetition": repeated_ngrams(*some).mean(),
        "response/distinct": torch.tensor(distinct_rows(*some)),
        "mismatch/mean": masked_mean(mismatch, mask),
        "mismatch/max": torch.where(mask, mismatch, 0.0).max(),
    }


def correct(experience: Experience, cap: float) -> tuple[Experience, dict[str, float]]:
    """Give stale rows the weights exp(logpi_old - logmu), truncated at ``cap`` (0: none at all); and their metrics."""
    mask = experience.rollout.response_mask
    ratios = log_importance(experience.old_logprobs, experience.rollout.rollout_logprobs, mask).exp()  # (B, T)
    weights = ratios.clamp(max=cap) if cap else torch.ones_like(ratios)
    metrics = {
        "importance/weight_mean": masked_mean(weights, mask),
        "importance/ratio_max": torch.where(mask, ratios, 0.0).max(),
        "importance/truncated": masked_mean((ratios > weights).float(), mask),
    }
    experience = replace(experience, importance_weights=weights if cap else None)
    return experience, {name: float(value) for name, value in metrics.items()}
