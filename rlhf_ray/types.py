"""What flows between the parts: messages, rollouts, experience, and ordered handles to row ranges.

Every per-token tensor obeys one alignment rule: entry [b, t] is a fact about token t given the tokens before it.
Rows are right-padded.  Nothing here is ever mutated; a changed row is a new row.

Left out on purpose: device placement (these live in host memory; a worker moves what it computes on) and Ray (a
handle is anything with ``result()``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """Who speaks: system, user or assistant."""
    content: str
    """What is said; never interpreted, so it can't contain a special token."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"message role is {self.role!r}; allowed are {', '.join(ROLES)}")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert tensor.shape == shape, f"{name} is {tuple(tensor.shape)}, expected {shape}"
    assert tensor.dtype == dtype, f"{name} is {tensor.dtype}, expected {dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """Prompts of one step, in row order, every prompt as often as its group has siblings."""

    step: int
    """Keys each row's random stream, together with the run's seed and the row's number."""
    prompt_ids: np.ndarray
    """(B,) int64: index into the prompt set."""
    group_ids: np.ndarray
    """(B,) int64: equal for the siblings of one prompt in this step, and never used by another step."""
    first_row: int = 0
    """Number of its first row in the step."""

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def rows(self, start: int, stop: int) -> PromptBatch:
        """Some of its rows, which keep their numbers."""
        return replace(
            self,
            prompt_ids=self.prompt_ids[start:stop],
            group_ids=self.group_ids[start:stop],
            first_row=self.first_row + start,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Prompts and the responses that one policy version sampled for them."""

    tokens: Tensor
    """(B, T) int64: prompt, response, then padding."""
    attention_mask: Tensor
    """(B, T) bool: prompt and response."""
    response_mask: Tensor
    """(B, T) bool: the response, up to and including its EOS."""
    rollout_logprobs: Tensor
    """(B, T) float32: the generator's own log-probability of each response token at the sampling temperature."""
    prompt_ids: Tensor
    """(B,) int64: index of the prompt in the prompt set."""
    group_ids: Tensor
    """(B,) int64: equal for the siblings of one prompt in one step."""
    policy_version: Tensor
    """(B,) int64: the weights that sampled the row."""
    finished: Tensor
    """(B,) bool: the response ended by EOS, not by its length."""

    def __post_init__(self) -> None:
        B, T = self.tokens.shape
        _check("tokens", self.tokens, (B, T), torch.int64)
        _check("attention_mask", self.attention_mask, (B, T), torch.bool)
        _check("response_mask", self.response_mask, (B, T), torch.bool)
        _check("rollout_logprobs", self.rollout_logprobs, (B, T), torch.float32)
        for name in ("prompt_ids", "group_ids", "policy_version"):
            _check(name, getattr(self, name), (B,), torch.int64)
        _check("finished", self.finished, (B,), torch.bool)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def width(self) -> int:
        """Columns up to the end of the longest row."""
        return int(self.attention_mask.sum(1).max())

    @property
    def response_lengths(self) -> Tensor:
        """(B,) int64: response tokens of each row."""
        return self.response_mask.sum(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the learner thinks of a rollout before it learns from it."""

    old_logprobs: Tensor
    """(B, T) float32: the learner's own log-probabilities, 0 outside the response."""
    entropy: Tensor
    """(B, T) float32: nats of the distribution that token t was drawn from, 0 outside the response."""
    values: Tensor | None
    """(B, T) float32: V before token t is emitted, 0 outside the response; None for critic-free algorithms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A batch of rollouts with every opinion on it."""

    rollout: Rollout
    scores: Tensor
    """(B,) float32: the reward of each whole response."""
    ref_logprobs: Tensor
    """(B, T) float32: the reference's log-probabilities, 0 outside the response."""
    evaluation: Evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A rollout with everything that the learner's loss needs."""

    rollout: Rollout
    old_logprobs: Tensor
    """(B, T) float32."""
    advantages: Tensor
    """(B, T) float32, whitened when the algorithm whitens."""
    values: Tensor | None
    """(B, T) float32; None for critic-free algorithms."""
    returns: Tensor | None
    """(B, T) float32; None for critic-free algorithms."""
    importance_weights: Tensor | None = None
    """(B, T) float32: how much likelier the policy is than the one that sampled, truncated; None counts as one."""

    def __post_init__(self) -> None:
        shape = tuple(self.rollout.tokens.shape)
        for name in ("old_logprobs", "advantages", "values", "returns", "importance_weights"):
            tensor = getattr(self, name)
            if tensor is not None:
                _check(name, tensor, shape, torch.float32)

    def __len__(self) -> int:
        return len(self.rollout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A policy's parameters as one flat buffer."""

    buffer: np.ndarray | Tensor
    """(N,): every parameter, in the order of ``named_parameters``; bfloat16 travels viewed as int16. A tensor where it
    stays on the card that sender and receiver share."""
    policy_version: int
    digest: str
    """Of the buffer's bytes and the version; a worker refuses weights that do not match."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Work that a role has done since it was last asked."""

    tokens: int = 0
    seconds: float = 0.0
    """Busy seconds, added over workers."""
    workers: int = 1
    peak_bytes: int = 0
    """Most memory that a worker's process has had since it began."""
    reduced: Mapping[str, int] = field(default_factory=dict)
    """Settings that were made smaller because memory did not suffice, and what they are now."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            tokens=self.tokens + other.tokens,
            seconds=self.seconds + other.seconds,
            workers=self.workers + other.workers,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
            reduced={
                name: min(used.reduced[name] for used in (self, other) if name in used.reduced)
                for name in {**self.reduced, **other.reduced}
            },
        )

    @property
    def tokens_per_second(self) -> float:
        """Tokens per busy second of one worker, times the workers; 0 when nothing was done."""
        return self.tokens * self.workers / self.seconds if self.seconds > 0 else 0.0


X = TypeVar("X")
X_co = TypeVar("X_co", covariant=True)


class Handle(Protocol[X_co]):
    """A value that may still be under way."""

    def result(self) -> X_co:
        """Wait for the value, and raise what its computation raised."""
        ...

    @staticmethod
    def results(handles: Sequence[Any]) -> list[Any]:
        """Wait for the values of several handles of this kind, which takes less than one after another."""
        ...


@dataclass(frozen=True, slots=True)
class Done(Generic[X]):
    """The handle of a value that is here already."""

    value: X

    def result(self) -> X:
        """Return the value."""
        return self.value

    @staticmethod
    def results(handles: Sequence[Done[Any]]) -> list[Any]:
        """Return the values."""
        return [handle.result() for handle in handles]


@dataclass(frozen=True, slots=True)
class Shards(Generic[X]):
    """Row ranges of one batch, in row order, each a handle: a group call takes and returns these and never waits."""

    handles: tuple[Handle[X], ...]

    def __len__(self) -> int:
        return len(self.handles)


def pad_columns(x: Tensor, width: int) -> Tensor:
    """(b, t) as (b, width), zeros to the right; the tensor itself where it is as wide."""
    return x if x.shape[1] == width else torch.nn.functional.pad(x, (0, width - x.shape[1]))


def concat(parts: Sequence[Any], *, width: int | None = None) -> Any:
    """Join equal-typed tensors or dataclasses of tensors along rows, (b, t) ones right-padded to ``width``.

    Without a width the widest part gives it.  AssertionError when a field is None in some parts and not in others.
    """
    first = parts[0]
    if first is None:
        assert all(part is None for part in parts)
        return None
    if isinstance(first, Tensor):
        if first.ndim == 1:
            return torch.cat(list(parts))
        columns = max(x.shape[1] for x in parts) if width is None else width
        return torch.cat([pad_columns(x, columns) for x in parts])
    return replace(
        first, **{f.name: concat([getattr(part, f.name) for part in parts], width=width) for f in fields(first)}
    )


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same dataclass with every tensor in it changed; None stays None."""
    if value is None or isinstance(value, Tensor):
        return None if value is None else change(value)
    return replace(value, **{f.name: _map(getattr(value, f.name), change) for f in fields(value)})


def select(value: Any, rows: Tensor | slice) -> Any:
    """The given rows of a dataclass of tensors."""
    return _map(value, lambda x: x[rows])


def columns(value: Any, which: slice) -> Any:
    """The given columns of every (B, T) tensor in a dataclass."""
    return _map(value, lambda x: x[:, which] if x.ndim == 2 else x)
