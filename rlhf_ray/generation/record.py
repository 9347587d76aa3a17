"""What the torch engine draws, kept on its device until all rows have ended."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.generation.requests import Completion, Stops
from rlhf_ray.generation.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Draws of N rows, flattened to (N + 1) * budget; the spare row serves free slots."""

    budget: int
    uniforms: Tensor
    """float64: decides each draw."""
    tokens: Tensor
    """int64."""
    logprobs: Tensor
    """float32."""
    log_kept: Tensor
    """float32."""
    stop_ids: Tensor
    """(n,) int64."""

    @classmethod
    def empty(cls, uniforms: np.ndarray, stops: Stops, device: torch.device) -> Record:
        """For uniforms (N, budget)."""
        N, budget = uniforms.shape
        draws = torch.zeros(N + 1, budget, dtype=torch.float64)
        draws[:N] = torch.from_numpy(np.ascontiguousarray(uniforms))
        draws = draws.view(-1).to(device)
        return cls(
            budget=budget,
            uniforms=draws,
            tokens=torch.zeros_like(draws, dtype=torch.int64),
            logprobs=torch.zeros_like(draws, dtype=torch.float32),
            log_kept=torch.zeros_like(draws, dtype=torch.float32),
            stop_ids=torch.from_numpy(stops.ids).to(device),
        )

    def completions(self, stops: Stops, sampling: Sampling) -> list[Completion]:
        """Each row, cut after what stops it."""
        rows = (x[: -self.budget].view(-1, self.budget).tolist() for x in (self.tokens, self.logprobs, self.log_kept))
        made = []
        for tokens, logprobs, log_kept in zip(*rows, strict=True):
            stop = stops.end(tokens, sampling.min_new_tokens)
            end = stop or self.budget
            made.append(
                Completion(
                    tokens=tokens[:end],
                    logprobs=logprobs[:end],
                    log_kept=log_kept[:end],
                    finished=stop is not None,
                )
            )
        return made
