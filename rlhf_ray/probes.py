"""The same few prompts answered again and again with the same random numbers: what training changes, in words.

Probes go the way of every row, through generator, reward, reference and learner, and nothing is learned from them, so
that a run's numbers are the same with and without them.  A policy is probed before the update that would change it.

Left out on purpose: greedy answers, which show what a policy likes best and nothing of what is rewarded: its samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from rlhf_ray.algorithms.ppo import credit
from rlhf_ray.config import PPOConfig
from rlhf_ray.ops.kl import kl_terms
from rlhf_ray.roles import Roles, gather
from rlhf_ray.samples import texts, token_texts
from rlhf_ray.tokenizer import Tokenizer
from rlhf_ray.types import Evaluation, Judged, PromptBatch, Rollout, Shards

STREAM = 2**63
"""Stands where a step's number keys a row's random stream; no run has so many steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Answers to the probes and what the roles make of them, still under way."""

    rollouts: Shards[Rollout]
    scores: Shards[Tensor]
    ref_logprobs: Shards[Tensor]
    evaluation: Shards[Evaluation]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """Fixed prompts of a run, and who answers and judges them."""

    prompts: range
    """Their numbers in the prompt set of the workers, after those that are trained on."""
    roles: Roles
    config: PPOConfig
    tokenizer: Tokenizer

    def due(self, step: int) -> bool:
        """Whether the policy after so many steps is probed: the first, every so often, and the last."""
        often = step % self.config.probe_every == 0 or step == self.config.total_steps
        return often and len(self.prompts) > 0

    def ask(self, policy_version: int) -> Asked:
        """Have the newest policy answer, and everybody judge, without waiting."""
        batch = PromptBatch(
            step=STREAM, prompt_ids=np.array(self.prompts, np.int64), group_ids=np.arange(len(self.prompts))
        )
        rollouts = self.roles.generator.generate(batch, policy_version)
        return Asked(
            rollouts=rollouts,
            scores=self.roles.reward.score(rollouts),
            ref_logprobs=self.roles.reference.logprobs(rollouts),
            evaluation=self.roles.learner.evaluate(rollouts),
        )

    def gather(self, asked: Asked) -> Judged:
        """Wait for all of it, which must be before the learner's next update."""
        rollout, scores, ref_logprobs, evaluation = gather(
            asked.rollouts, asked.scores, asked.ref_logprobs, asked.evaluation
        )
        return Judged(rollout=rollout, scores=scores, ref_logprobs=ref_logprobs, evaluation=evaluation)

    def rows(self, judged: Judged, kl_coef: float) -> Iterator[dict[str, Any]]:
        """One row a prompt: its answer, and lists of what is thought of each token, KL in nats.

        Advantages are the batch's before whitening, which over so few rows would say nothing.
        """
        plain = self.config.ppo.model_copy(update={"whiten_advantages": False, "whiten_rewards": False})
        experience, _ = credit(plain, judged, kl_coef)
        rollout, mask = judged.rollout, judged.rollout.response_mask
        kl = kl_terms(experience.old_logprobs, judged.ref_logprobs, mask)  # (B, T)
        for row in range(len(rollout)):
            said = mask[row]
            prompt, response = texts(rollout, row, self.tokenizer)
            values = {} if experience.values is None else {"token_value": experience.values[row][said].tolist()}
            yield {
                "prompt": prompt,
                "response": response,
                "score": float(judged.scores[row]),
                "kl": float(kl[row].sum()),
                "finished": bool(rollout.finished[row]),
                "tokens": token_texts(rollout.tokens[row][said].tolist(), self.tokenizer),
                "token_kl": kl[row][said].tolist(),
                **values,
                "token_advantage": experience.advantages[row][said].tolist(),
            }
