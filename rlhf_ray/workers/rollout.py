"""Samples responses from the newest policy that it was given."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rlhf_ray.config import LoRA
from rlhf_ray.data.prompt_set import PromptSet
from rlhf_ray.generation import make_engine
from rlhf_ray.generation.native_engine import NativeEngine
from rlhf_ray.generation.requests import Completion
from rlhf_ray.generation.rollouts import to_rollout
from rlhf_ray.generation.sampling import Sampling, row_uniforms
from rlhf_ray.generation.slots import ROW_BLOCK
from rlhf_ray.models import GPT2
from rlhf_ray.models.hf_weights import load_policy
from rlhf_ray.models.lora import published, with_adapters, with_plain_embeddings
from rlhf_ray.models.shared_base import FrozenBase
from rlhf_ray.shortage import Portion, named
from rlhf_ray.tokenizer import Tokenizer
from rlhf_ray.types import PromptBatch, Rollout, Usage, Weights
from rlhf_ray.workers.direct import Inlet, Notice
from rlhf_ray.workers.meter import Meter, give_back
from rlhf_ray.workers.ranks import Meeting
from rlhf_ray.workers.weights import import_weights


class RolloutWorker:
    """Policy weights, key-value cache and engine.

    Every row draws from its own stream, keyed by (seed, step, row), so neither the worker nor the other rows of a
    shard have a part in what it says.
    """

    @named("rollout", "start")
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
        lora: LoRA | None = None,
        base: FrozenBase | None = None,
        auto_micro_batch: bool = False,
    ) -> None:
        """0 ``threads`` are its ``share`` of the cores where rows don't depend on it: in the native pass.

        ``tokenizer`` is needed for stop strings alone.  With a ``lora`` adapters arrive as weights, for the learner's
        ``base``: on a CPU engines merge them while they pack, so that only what is packed is this worker's own; on a
        GPU they stay beside it.  With ``auto_micro_batch`` fewer rows are generated at once
        where memory does not suffice.
        """
        self.policy = _load(folder, device=device, dtype=dtype, lora=lora, base=base)
        self.published = published(self.policy)
        text = None if tokenizer is None else partial(tokenizer.token_bytes, skip_special=False)
        self.engine = make_engine(self.policy, eos_id=eos_id, pad_id=pad_id, max_rows=max_rows, text=text, kind=engine)
        block = 1 if isinstance(self.engine, NativeEngine) else ROW_BLOCK
        self.portion = Portion(setting="generation.max_rows", size=max_rows, least=block, auto=auto_micro_batch)
        self.prompts = prompts
        self.sampling = sampling
        self.seed = seed
        self.pad_id = pad_id
        self.policy_version = -1
        self.inlet = Inlet(self.policy.wte.weight.device)
        self.meter = Meter(threads or (share if isinstance(self.engine, NativeEngine) else 1))

    @named("rollout", "publish")
    def update_weights(self, weights: Weights) -> None:
        """Take over a policy; AssertionError when its bytes or its version are not those that were sent."""
        import_weights(self.published, weights, threads=self.meter.threads)
        self.policy_version = weights.policy_version

    def receive(self, meeting: Meeting) -> None:
        """Take part in a broadcast of weights; beside other work, which it does not change."""
        self.inlet.receive(meeting)

    def take(self, notice: Notice) -> bool:
        """Take over weights that have come directly, checked as `update_weights` does; False where they have not."""
        with self.inlet.found(notice) as weights:
            if weights is not None:
                self.update_weights(weights)
        return weights is not None

    def generate(self, batch: PromptBatch, policy_version: int) -> Rollout:
        """Answer the prompts of some rows; AssertionError when the policy is not the one asked for."""
        assert self.policy_version == policy_version, (
            f"rollout worker holds policy version {self.policy_version}, asked to sample with {policy_version}"
        )
        prompts = [list(self.prompts.token_ids[i]) for i in batch.prompt_ids]
        rows, length = range(batch.first_row, batch.first_row + len(batch)), self.sampling.max_new_tokens
        uniforms = np.stack([row_uniforms(self.seed, batch.step, row, length) for row in rows])  # (b, length)
        with self.meter.busy(), named("rollout", "generate", self.portion):
            answer = partial(self._answer, prompts, uniforms)
            lengths = partial(torch.tensor, [len(prompt) for prompt in prompts])
            completions = self.portion.attempt(answer, lengths, undo=self.engine.release)
        self.meter.count(sum(len(completion.tokens) for completion in completions))
        rollout = to_rollout(
            prompts,
            completions,
            pad_id=self.pad_id,
            prompt_ids=batch.prompt_ids.tolist(),
            policy_version=self.policy_version,
        )
        return replace(rollout, group_ids=torch.from_numpy(batch.group_ids.copy()))

    def _answer(self, prompts: list[list[int]], uniforms: np.ndarray) -> list[Completion]:
        self.engine.max_rows = self.portion.size
        return self.engine.generate(prompts, uniforms, self.sampling)

    def sleep(self) -> None:
        """Give back what the next call makes again: the cache, and what the engine makes of the weights."""
        self.engine.release()
        give_back()

    def usage(self) -> Usage:
        """Tokens generated and seconds spent since the last call."""
        return self.meter.take(self.portion.reduced)

    def __repr__(self) -> str:
        return f"RolloutWorker(version={self.policy_version})"


def _load(folder: Path, *, device: str, dtype: torch.dtype, lora: LoRA | None, base: FrozenBase | None) -> GPT2:
    """The folder's policy for inference; with a ``lora`` its base, new adapters, and embeddings in ``dtype``."""
    if lora is None:
        return load_policy(folder, device=device, dtype=dtype).eval().requires_grad_(False)
    assert base is not None
    adapted = with_adapters(base.open(device), lora, seed=0)
    return with_plain_embeddings(adapted, dtype).requires_grad_(False)
