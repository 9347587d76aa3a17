"""What one policy answers to a set of prompts, and what a judge, a reward model and another policy say of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.config import EvaluateConfig
from rlhf_ray.data.prompt_set import PromptSet
from rlhf_ray.evaluation.distinct import distinct_n
from rlhf_ray.evaluation.judges import Judge
from rlhf_ray.generation import Sampling, make_engine, row_uniforms
from rlhf_ray.generation.rollouts import to_rollout
from rlhf_ray.models.gpt2 import GPT2
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.scoring import in_micro_batches, policy_logprobs
from rlhf_ray.rewards.base import response_texts
from rlhf_ray.shortage import micro_batch
from rlhf_ray.tokenizer import Tokenizer
from rlhf_ray.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What one policy said: one response a prompt."""

    texts: tuple[str, ...]
    lengths: tuple[int, ...]
    """Tokens of each response, EOS included."""
    finished: tuple[bool, ...]
    """Whether each response ended by EOS."""
    kl: tuple[float, ...]
    """Sequence KL from the baseline in nats; 0 for the baseline itself."""
    judged: tuple[float, ...] | None
    """The judge's numbers; None without a judge."""
    scores: tuple[float, ...] | None
    """The reward model's scores; None without one."""

    @property
    def distinct_2(self) -> float:
        """Distinct-2 over words."""
        return distinct_n([text.split() for text in self.texts])


def sample(
    policy: GPT2, tokenizer: Tokenizer, prompts: PromptSet, sampling: Sampling, *, seed: int, max_rows: int
) -> Rollout:
    """One response a prompt (B rows); row i draws from the stream (seed, 0, i), whatever the policy is."""
    engine = make_engine(policy, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, max_rows=max_rows)
    rows, length = range(len(prompts)), sampling.max_new_tokens
    uniforms = np.stack([row_uniforms(seed, 0, row, length) for row in rows])  # (B, length)
    completions = engine.generate(prompts.token_ids, uniforms, sampling)
    return to_rollout(prompts.token_ids, completions, pad_id=tokenizer.pad_id, prompt_ids=rows)


@torch.inference_mode()
def sequence_kl(rollout: Rollout, policy: GPT2, baseline: GPT2, *, temperature: float, batch_size: int) -> Tensor:
    """(B,) sum over the response of log p_policy - log p_baseline, in nats."""

    def logprobs(model: GPT2) -> Tensor:
        def score(micro: Rollout) -> Tensor:
            return policy_logprobs(model, micro, temperature=temperature, dtype=torch.float32)

        return in_micro_batches(rollout, micro_batch(batch_size), score)  # (B, T)

    return (logprobs(policy) - logprobs(baseline)).sum(1)


@torch.inference_mode()
def reward_scores(rollout: Rollout, reward_model: ValueModel, *, batch_size: int) -> Tensor:
    """(B,) the reward model's scores, read at the last token of each response."""
    device = reward_model.score.weight.device

    def score(micro: Rollout) -> Tensor:
        scores: Tensor = reward_model(micro.tokens.to(device), micro.attention_mask.to(device))
        return scores.float()

    return in_micro_batches(rollout, micro_batch(batch_size), score)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Everything that rates a policy's answers."""

    config: EvaluateConfig
    tokenizer: Tokenizer
    prompts: PromptSet
    baseline: GPT2
    reward_model: ValueModel | None
    judge: Judge | None

    def rate(self, policy: GPT2) -> Answers:
        """Sample a policy on every prompt and rate what it says."""
        config, batch_size = self.config, self.config.batch_size
        sampling = Sampling(max_new_tokens=config.response_length, temperature=config.temperature)
        rollout = sample(policy, self.tokenizer, self.prompts, sampling, seed=config.seed, max_rows=batch_size)
        temperature = config.temperature or 1.0  # greedy samples, distributions at 1
        kl = sequence_kl(rollout, policy, self.baseline, temperature=temperature, batch_size=batch_size)
        scores = None
        if self.reward_model is not None:
            scores = tuple(reward_scores(rollout, self.reward_model, batch_size=batch_size).tolist())
        texts = response_texts(rollout, self.tokenizer)
        judged = None
        if self.judge is not None:
            judged = tuple(map(self.judge, self.prompts.rows, texts))
        return Answers(
            texts=tuple(texts),
            lengths=tuple(rollout.response_lengths.tolist()),
            finished=tuple(rollout.finished.tolist()),
            kl=tuple(kl.tolist()),
            judged=judged,
            scores=scores,
        )
