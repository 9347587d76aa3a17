"""Samples responses from the newest policy that it was given."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rlhf_ray.data.prompt_set import PromptSet
from rlhf_ray.generation import make_engine
from rlhf_ray.generation.native_engine import NativeEngine
from rlhf_ray.generation.rollouts import to_rollout
from rlhf_ray.generation.sampling import Sampling, row_uniforms
from rlhf_ray.models.hf_weights import load_policy
from rlhf_ray.tokenizer import Tokenizer
from rlhf_ray.types import PromptBatch, Rollout, Usage, Weights
from rlhf_ray.workers.meter import Meter
from rlhf_ray.workers.weights import import_weights


class RolloutWorker:
    """Policy weights, key-value cache and engine.

    Every row draws from its own stream, keyed by (seed, step, row), so neither the worker nor the other rows of a
    shard have a part in what it says.
    """

    def __init__(
        self,
        folder: Path,
        prompts: PromptSet,
        sampling: Sampling,
        *,
        seed: int,
        eos_id: int,
        pad_id: int,
        max_rows: int,
        device: str,
        dtype: torch.dtype,
        threads: int,
        share: int = 1,
        engine: str = "auto",
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """0 ``threads`` are its ``share`` of the cores where rows don't depend on it: in the native pass.

        ``tokenizer`` is needed for stop strings alone.
        """
        self.policy = load_policy(folder, device=device, dtype=dtype).eval().requires_grad_(False)
        text = None if tokenizer is None else partial(tokenizer.token_bytes, skip_special=False)
        self.engine = make_engine(self.policy, eos_id=eos_id, pad_id=pad_id, max_rows=max_rows, text=text, kind=engine)
        self.prompts = prompts
        self.sampling = sampling
        self.seed = seed
        self.pad_id = pad_id
        self.policy_version = -1
        self.meter = Meter(threads or (share if isinstance(self.engine, NativeEngine) else 1))

    def update_weights(self, weights: Weights) -> None:
        """Take over a policy; AssertionError when its bytes or its version are not those that were sent."""
        import_weights(self.policy, weights, threads=self.meter.threads)
        self.policy_version = weights.policy_version

    def generate(self, batch: PromptBatch, policy_version: int) -> Rollout:
        """Answer the prompts of some rows; AssertionError when the policy is not the one asked for."""
        assert self.policy_version == policy_version, (
            f"rollout worker holds policy version {self.policy_version}, asked to sample with {policy_version}"
        )
        prompts = [list(self.prompts.token_ids[i]) for i in batch.prompt_ids]
        rows, length = range(batch.first_row, batch.first_row + len(batch)), self.sampling.max_new_tokens
        uniforms = np.stack([row_uniforms(self.seed, batch.step, row, length) for row in rows])  # (b, length)
        with self.meter.busy():
            completions = self.engine.generate(prompts, uniforms, self.sampling)
        self.meter.count(sum(len(completion.tokens) for completion in completions))
        rollout = to_rollout(
            prompts,
            completions,
            pad_id=self.pad_id,
            prompt_ids=batch.prompt_ids.tolist(),
            policy_version=self.policy_version,
        )
        return replace(rollout, group_ids=torch.from_numpy(batch.group_ids.copy()))

    def usage(self) -> Usage:
        """Tokens generated and seconds spent since the last call."""
        return self.meter.take()

    def __repr__(self) -> str:
        return f"RolloutWorker(version={self.policy_version})"
