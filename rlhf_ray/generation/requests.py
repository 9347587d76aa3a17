"""What an engine is asked and what it answers, whichever engine it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_ray.generation.sampling import Sampling
from rlhf_ray.models.gpt2 import GPT2

TextOf = Callable[[Sequence[int]], bytes]
"""The bytes of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What was generated for one prompt."""

    tokens: list[int]
    """The response, what it stopped at included."""
    logprobs: list[float]
    """Log-probability of each token in the full distribution at the temperature (at 1 when that is 0)."""
    log_kept: list[float]
    """Log of the full distribution's mass that each token was drawn from: 0 when nothing was left out."""
    finished: bool
    """The response ended by a stop token or string, not by its length."""


class Engine(ABC):
    """Generates with a model whose weights may change between calls; one thread at a time may call it."""

    def __init__(
        self, model: GPT2, *, eos_id: int, pad_id: int, max_rows: int = 64, text: TextOf | None = None
    ) -> None:
        """``max_rows`` bounds the rows generated at once; ``text`` gives the bytes of tokens, for stop strings."""
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; it must be at least 1")
        self.model = model
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.max_rows = max_rows
        self.text = text

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in order, whatever order they end in.

        uniforms (B, >= max_new_tokens) float64 in [0, 1) decide every draw.  ValueError for an empty prompt,
        for one that leaves no room for ``max_new_tokens`` within ``n_positions``, and for too few uniforms.
        """

    @abstractmethod
    def stream(self, prompt: Sequence[int], uniforms: np.ndarray, sampling: Sampling) -> Iterator[int]:
        """The tokens of one completion as they are drawn, what it stops at included; uniforms (>= max_new_tokens,).

        ValueError as for ``generate``.
        """

    @abstractmethod
    def release(self) -> None:
        """Free everything that the next call can make again: caches, copies of weights, captured graphs."""


class Stops:
    """What ends a response: EOS, further stop tokens, and strings that its text contains."""

    def __init__(self, sampling: Sampling, eos_id: int, text: TextOf | None) -> None:
        """``text`` gives the bytes of tokens; ValueError when there are stop strings and no text."""
        if sampling.stop and text is None:
            raise ValueError("stop strings need the engine to have the tokenizer's text; give it one, or stop_ids")
        self.ids = np.array(sorted({eos_id, *sampling.stop_ids}))
        self.strings = tuple(string.encode() for string in sampling.stop)
        self._text = text
        self._tail = max(map(len, self.strings), default=0)  # a token has at least one byte

    def completes(self, tokens: Sequence[int]) -> bool:
        """Whether a stop string stands in the text of the last tokens, as it does when the newest completes it."""
        if not self.strings:
            return False
        assert self._text is not None
        tail = self._text(tokens[-self._tail :])
        return any(string in tail for string in self.strings)

    def end(self, tokens: Sequence[int], minimum: int) -> int | None:
        """How many of a row's tokens there are up to its stop; None when nothing stops it."""
        for t, token in enumerate(tokens, 1):
            if token in self.ids or (t >= minimum and self.strings and self.completes(tokens[:t])):
                return t
        return None


def check_requests(
    prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling, n_positions: int
) -> None:
    """Raise ValueError for what no engine can answer."""
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: it needs at least one token to continue from")
        if len(prompt) + sampling.max_new_tokens > n_positions:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens and max_new_tokens is {sampling.max_new_tokens}: "
                f"together they exceed n_positions {n_positions}; shorten either"
            )
    if len(uniforms) != len(prompts) or (len(prompts) and uniforms.shape[1] < sampling.max_new_tokens):
        raise ValueError(
            f"uniforms are {uniforms.shape}; {len(prompts)} prompts and max_new_tokens "
            f"{sampling.max_new_tokens} need ({len(prompts)}, {sampling.max_new_tokens})"
        )
