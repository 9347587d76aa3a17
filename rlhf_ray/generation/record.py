"""What the torch engine draws, kept on its device until all rows have ended."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.generation.requests import Completion, Stops
from rlhf_ray.generation.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """Draws of up to N rows, flattened to (N + 1) * budget; the spare row serves free slots.

    What a call leaves behind stays until the next one writes over it.
    """

    sampling: Sampling
    """Its ``max_new_tokens`` are the budget."""
    uniforms: Tensor
    """float64: decides each draw."""
    tokens: Tensor
    """int64."""
    logprobs: Tensor
    """float32."""
    log_kept: Tensor
    """float32."""
    stops: Tensor
    """(V,) bool: True on tokens that end a row."""

    @classmethod
    def empty(cls, rows: int, sampling: Sampling, stop_ids: np.ndarray, embedding: Tensor) -> Record:
        """For up to so many rows of a model with this embedding (V, D), on its device."""
        draws = embedding.new_zeros((rows + 1) * sampling.max_new_tokens, dtype=torch.float64)
        ends = np.isin(np.arange(len(embedding)), stop_ids)  # (V,)
        return cls(
            sampling=sampling,
            uniforms=draws,
            tokens=torch.zeros_like(draws, dtype=torch.int64),
            logprobs=torch.zeros_like(draws, dtype=torch.float32),
            log_kept=torch.zeros_like(draws, dtype=torch.float32),
            stops=torch.from_numpy(ends).to(embedding.device),
        )

    @property
    def spare(self) -> int:
        """Where the spare row begins."""
        return len(self.tokens) - self.sampling.max_new_tokens

    def holds(self, rows: int) -> bool:
        """Whether there is room for so many rows."""
        return self.spare >= rows * self.sampling.max_new_tokens

    def begin(self, uniforms: np.ndarray) -> None:
        """Take the uniforms (N, >= budget) of the next rows."""
        draws = np.ascontiguousarray(uniforms[:, : self.sampling.max_new_tokens])
        self.uniforms[: draws.size] = torch.from_numpy(draws).view(-1).to(self.uniforms.device)

    def said(self) -> Tensor:
        """(N, budget) the tokens so far, on the host."""
        return self.tokens.view(-1, self.sampling.max_new_tokens).cpu()

    def completions(self, rows: int, stops: Stops) -> list[Completion]:
        """Each of the first rows, cut after what stops it."""
        budget, minimum = self.sampling.max_new_tokens, self.sampling.min_new_tokens
        drawn = (x[: rows * budget].view(rows, budget).tolist() for x in (self.tokens, self.logprobs, self.log_kept))
        made = []
        for tokens, logprobs, log_kept in zip(*drawn, strict=True):
            stop = stops.end(tokens, minimum)
            end = stop or budget
            made.append(
                Completion(
                    tokens=tokens[:end],
                    logprobs=logprobs[:end],
                    log_kept=log_kept[:end],
                    finished=stop is not None,
                )
            )
        return made
