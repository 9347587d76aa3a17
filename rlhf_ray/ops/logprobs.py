"""Log-probabilities of given tokens, without ever holding the logits of a whole batch.

Hidden states become logits a chunk at a time, and the chunk's memory becomes in turn exponentials, probabilities
and the gradient of the logits: four passes over it in all, and the weight's gradient adds up in place.  The shift
between a hidden state and the token that it predicts happens in ``before`` and nowhere else.

Matrix products run in autocast's type with float32 sums; everything between them is float32.  On a GPU logits are
float32 too; no product on a CPU returns float32 of bfloat16, so there they are rounded once.

Left out on purpose: a second derivative, and sharing the vocabulary among devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = {"cpu": 2**22, "cuda": 2**26}
"""Logits of one chunk: on a CPU about what its last cache holds, on a GPU 256 MiB."""
KEPT = 2**26
"""Logits kept for the backward pass, 256 MiB; those beyond are computed again."""


class Rows(Protocol):
    """A head's weight (V, D) that does not learn and is kept in another form."""

    def __len__(self) -> int: ...

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]: ...  # rows after rows, and where they are


def head_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Float32 logits (..., V) of hidden (..., D) and head_weight (V, D), autocast or not."""
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.is_cuda and hidden.dtype == head_weight.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            flat = hidden.reshape(-1, hidden.shape[-1])  # the weight is read as it is
            return _product(flat, head_weight.t()).view(*hidden.shape[:-1], len(head_weight))
        return F.linear(hidden.float(), head_weight.float())


def before(mask: Tensor) -> Tensor:
    """Where to read what is said about the tokens of mask (B, T): (B, T) bool, one place to the left of each.

    The first token of a row has no such place.
    """
    return F.pad(mask[:, 1:], (0, 1))


def at_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """What was read ``before`` the tokens of mask (B, T), x (n,), at those tokens: (B, T), 0 elsewhere."""
    places = F.pad(mask[:, 1:], (1, 0)).flatten().nonzero()[:, 0].to(x.device, non_blocking=True)
    return x.new_zeros(mask.numel()).index_put((places,), x).view(mask.shape)


def token_logprobs(
    states: Tensor,
    head_weight: Tensor | Rows,
    tokens: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability, in nats, of each masked token given those before it, and the entropy of its draw.

    states (n, D) are the hidden states ``before`` the masked tokens, in their order; head_weight (V, D), tokens
    (B, T) int64, mask (B, T) bool -> logprobs (B, T) float32 and entropy (B, T) float32 or None, on the
    states' device.  Both are 0 where the mask is False and at t = 0.  Tokens that the mask leaves out are never
    read.  ``chunk_size`` counts states.  ValueError when ``temperature`` or ``chunk_size`` is not positive.
    """
    assert tokens.shape == mask.shape, f"tokens {tokens.shape}, mask {mask.shape}"
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; a log-probability needs one above 0")
    targets = tokens[:, 1:][mask[:, 1:]].to(states.device, non_blocking=True)  # (n,)
    chunk_size = _chunk_size(states, head_weight, chunk_size)
    logprobs, entropy = _LogProbs.apply(states, head_weight, targets, temperature, chunk_size, with_entropy)
    return at_tokens(logprobs, mask), at_tokens(entropy, mask) if with_entropy else None


def weighted_nll_sum(
    states: Tensor, head_weight: Tensor | Rows, targets: Tensor, weights: Tensor, *, chunk_size: int | None = None
) -> Tensor:
    """The sum of -w log p over targets (n,) with weights (n,), read from states (n, D): a scalar tensor.

    Gradients are formed with the loss, so that no logits are kept or computed twice.  ValueError when
    ``chunk_size``, which counts states, is not positive.
    """
    chunk_size = _chunk_size(states, head_weight, chunk_size)
    loss: Tensor = _WeightedNLL.apply(states, head_weight, targets, weights, chunk_size)
    return loss


def _chunk_size(states: Tensor, head_weight: Tensor | Rows, given: int | None) -> int:
    size = max(64, CHUNK[states.device.type] // len(head_weight)) if given is None else given
    if size < 1:
        raise ValueError(f"chunk_size is {size}; it must be at least 1")
    assert len(states) == 0 or states.ndim == 2, f"states are {tuple(states.shape)}, expected (n, D)"
    return size


def product_type(device: torch.device) -> torch.dtype:
    """Autocast's type where it is on, else float32."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) times b (k, n), of one type: (m, n) float32."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


class _Head:
    """What is done to a chunk of states (n, D): logits and softmax forward, matrix products backward."""

    def __init__(
        self,
        states: Tensor,
        weight: Tensor | Rows,
        targets: Tensor,
        *,
        temperature: float,
        chunk_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.scaled = (states.float() / temperature).to(dtype)  # (n, D), so that logits are divided by it
        self.weight = weight.to(dtype) if isinstance(weight, Tensor) else weight  # (V, D)
        self.targets = targets[:, None]
        self.temperature = temperature
        self.chunks = [slice(start, start + chunk_size) for start in range(0, len(states), chunk_size)]

    def shifted(self, rows: slice) -> Tensor:
        """z - max z (c, V): the chunk's logits, the largest of each row taken off."""
        logits = self._logits(self.scaled[rows])
        return logits.sub_(logits.amax(1, keepdim=True))

    def _logits(self, scaled: Tensor) -> Tensor:
        """(c, D) -> (c, V)."""
        if isinstance(self.weight, Tensor):
            return _product(scaled, self.weight.t())
        logits = scaled.new_empty(len(scaled), len(self.weight), dtype=torch.float32)
        for columns, block in self.weight.blocks(scaled.dtype):
            logits[:, columns] = _product(scaled, block.t())
        return logits

    def _states(self, by_logits: Tensor) -> Tensor:
        """The gradient of states (c, D) from that of their logits (c, V)."""
        if isinstance(self.weight, Tensor):
            return _product(by_logits, self.weight)
        blocks = self.weight.blocks(by_logits.dtype)
        return sum(_product(by_logits[:, columns], block) for columns, block in blocks)  # type: ignore[return-value]

    def chosen(self, shifted: Tensor, rows: slice) -> Tensor:
        """(c,): what (c, V) holds for the targets."""
        return shifted.gather(1, self.targets[rows])[:, 0]

    def gradients(self, needed: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
        """Room for the gradients of states and weight, where they are needed."""
        by_state = torch.empty_like(self.scaled, dtype=torch.float32) if needed[0] else None
        if not needed[1]:
            return by_state, None
        assert isinstance(self.weight, Tensor)
        return by_state, torch.zeros_like(self.weight, dtype=torch.float32)

    def add(self, by_logits: Tensor, rows: slice, by_state: Tensor | None, by_weight: Tensor | None) -> None:
        """Turn the gradient of a chunk's logits (c, V) into that of its states, and into its part of the weight's."""
        by_logits = by_logits.to(self.scaled.dtype)
        if by_state is not None:
            by_state[rows] = self._states(by_logits).div_(self.temperature)
        if by_weight is None:
            return
        if by_logits.dtype == torch.float32:
            by_weight.addmm_(by_logits.t(), self.scaled[rows])
        else:
            by_weight += _product(by_logits.t(), self.scaled[rows])


class _LogProbs(torch.autograd.Function):
    """Log-probabilities and entropies (n,) of targets; exponentials are kept as far as ``KEPT`` goes."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor | Rows,
        targets: Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = product_type(states.device)
        ctx.options = {"temperature": temperature, "chunk_size": chunk, "dtype": dtype}
        head = _Head(states, weight, targets, **ctx.options)
        logprobs, entropy, total = states.new_empty(3, len(states), dtype=torch.float32)
        room = KEPT if any(ctx.needs_input_grad) else 0
        ctx.kept = []
        for rows in head.chunks:
            shifted = head.shifted(rows)
            chosen = head.chosen(shifted, rows)
            exponentials = shifted.exp() if with_entropy else shifted.exp_()
            total[rows] = exponentials.sum(1)
            logprobs[rows] = chosen - total[rows].log()
            if with_entropy:
                entropy[rows] = total[rows].log() - torch.linalg.vecdot(exponentials, shifted) / total[rows]
            room -= exponentials.numel()
            if room >= 0:
                ctx.kept.append(exponentials)
        ctx.rows = None if isinstance(weight, Tensor) else weight
        kept_weight = weight if ctx.rows is None else None
        ctx.save_for_backward(states, kept_weight, targets, total, entropy if with_entropy else None)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logprob: Tensor, by_entropy: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, targets, total, entropy = ctx.saved_tensors
        head = _Head(states, weight if ctx.rows is None else ctx.rows, targets, **ctx.options)
        by_state, by_weight = head.gradients(ctx.needs_input_grad)
        kept, ctx.kept = ctx.kept, []
        for number, rows in enumerate(head.chunks):
            p = kept[number] if number < len(kept) else head.shifted(rows).exp_()
            g = by_logprob[rows, None]
            if entropy is None:
                p.mul_(-g / total[rows, None])
            else:
                p.div_(total[rows, None])
                surprise = torch.xlogy(p, p).addcmul_(p, entropy[rows, None])  # p (log p + H)
                p.mul_(-g).addcmul_(surprise, by_entropy[rows, None], value=-1)
            head.add(p.scatter_add_(1, head.targets[rows], g), rows, by_state, by_weight)
        return None if by_state is None else by_state.to(states.dtype), by_weight, None, None, None, None


class _WeightedNLL(torch.autograd.Function):
    """The sum of -w log p, with its gradients formed at once."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor | Rows, targets: Tensor, weights: Tensor, chunk: int
    ) -> Tensor:
        dtype = product_type(states.device)
        head = _Head(states, weight, targets, temperature=1.0, chunk_size=chunk, dtype=dtype)
        learning = any(ctx.needs_input_grad)
        by_state, by_weight = head.gradients(ctx.needs_input_grad)
        logprobs = states.new_empty(len(states), dtype=torch.float32)
        for rows in head.chunks:
            shifted = head.shifted(rows)
            chosen = head.chosen(shifted, rows)
            p = shifted.exp_()
            total = p.sum(1)
            logprobs[rows] = chosen - total.log()
            if learning:
                w = weights[rows, None]
                p.mul_(w / total[:, None]).scatter_add_(1, head.targets[rows], -w)
                head.add(p, rows, by_state, by_weight)
        ctx.gradients = None if by_state is None else by_state.to(states.dtype), by_weight
        return -(weights * logprobs).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (by_state, by_weight), ctx.gradients = ctx.gradients, (None, None)
        scaled = [None if gradient is None else gradient.mul_(upstream) for gradient in (by_state, by_weight)]
        return *scaled, None, None, None
