"""Samples of the SFT policy, on which a reward model is normalised (Ziegler et al. 2019).

Sampled once and kept: the policy does not change while the reward model learns.

Left out on purpose: any choice among samples; these are what the policy says at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rlhf_ray.data.prompt_set import tokenise_prompts
from rlhf_ray.data.rows import PromptRow
from rlhf_ray.generation import Sampling, make_engine, row_uniforms
from rlhf_ray.models.hf_weights import load_policy
from rlhf_ray.tokenizer import Tokenizer, find_template

MAX_ROWS = 256


class PolicySampler:
    """Answers prompts with a frozen policy."""

    def __init__(
        self,
        folder: Path,
        rows: Sequence[PromptRow],
        *,
        template: str,
        max_length: int,
        response_length: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Tokenise the prompts; ValueError when no room is left for them."""
        if response_length >= max_length:
            raise ValueError(
                f"response_length = {response_length} leaves no room for a prompt "
                f"in max_length = {max_length}; lower it"
            )
        self.folder = folder
        self.tokenizer = Tokenizer.load(folder)
        self.prompts = tokenise_prompts(
            rows,
            self.tokenizer,
            find_template(template),
            max_length=max_length - response_length,
            long_prompts="cut",
        )
        self.sampling = Sampling(max_new_tokens=response_length)
        self.seed, self.device, self.dtype = seed, device, dtype

    def sample(self, count: int, *, draw: int) -> list[list[int]]:
        """``count`` rows of prompt and response; draws of different numbers share neither streams nor,
        where there are enough, prompts.
        """
        order = np.random.default_rng(self.seed).permutation(len(self.prompts))
        chosen = [int(order[(draw * count + i) % len(order)]) for i in range(count)]
        prompts = [list(self.prompts.token_ids[i]) for i in chosen]
        length = self.sampling.max_new_tokens
        uniforms = np.stack([row_uniforms(self.seed, draw, row, length) for row in range(count)])  # (count, length)
        policy = load_policy(self.folder, device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        tokens = self.tokenizer
        engine = make_engine(policy, eos_id=tokens.eos_id, pad_id=tokens.pad_id, max_rows=MAX_ROWS)
        completions = engine.generate(prompts, uniforms, self.sampling)
        return [prompt + completion.tokens for prompt, completion in zip(prompts, completions, strict=True)]
