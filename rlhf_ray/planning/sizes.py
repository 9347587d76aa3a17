"""Bytes of a GPT-2's parts: weights, adapters, what a pass keeps, logits, the key-value cache.

Arithmetic on the model's shape, counted from our own layers (``models/gpt2.py``, ``ops/logprobs.py``, ``generation/``)
and not fitted to measurements; rows are taken to be of full length.

Left out on purpose: masks, positions and other things of a few bytes a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.models.gpt2 import GPT2Config
from rlhf_ray.models.quantised import BLOCK, GROUP
from rlhf_ray.ops.logprobs import CHUNK, KEPT

FLOAT = 4
HALF = 2
ADAPTERS = {"attention_in": (1, 3), "attention_out": (1, 1), "mlp_in": (1, 4), "mlp_out": (4, 1)}
"""Widths in and out of what a LoRA adapter stands beside, in widths of the model."""
MOMENT_BLOCK = 256
"""Numbers of an 8-bit moment that share a scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one forward pass."""

    rows: int
    prompt: int
    """Tokens of a prompt."""
    response: int
    """Tokens of a response, before each of which something is read."""

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.rows * (self.prompt + self.response)

    @property
    def read(self) -> int:
        """Places from which something is read."""
        return self.rows * self.response


def projections(shape: GPT2Config) -> int:
    """Numbers in the matrices of all blocks."""
    return shape.n_layer * 12 * shape.n_embd**2


def parameters(shape: GPT2Config) -> int:
    """Numbers in the whole model; the tied embedding counts once."""
    D = shape.n_embd
    return (shape.vocab_size + shape.n_positions) * D + projections(shape) + 13 * shape.n_layer * D + 2 * D


def stored(shape: GPT2Config, kind: str) -> int:
    """Bytes of weights that never learn, as ``memory.frozen`` keeps them."""
    table = shape.vocab_size * shape.n_embd
    matrices, rest = projections(shape), parameters(shape) - projections(shape) - table
    if kind == "float32":
        return FLOAT * parameters(shape)
    if kind == "bfloat16":
        return HALF * (matrices + table) + FLOAT * rest
    rows = shape.n_layer * 9 * shape.n_embd  # output channels, a scale each
    embedding = table + FLOAT * shape.vocab_size  # in 8 bits either way
    packed = matrices + FLOAT * rows if kind == "int8" else matrices // 2 + FLOAT * matrices // GROUP
    return packed + embedding + FLOAT * rest


def adapters(shape: GPT2Config, rank: int, targets: Sequence[str]) -> int:
    """Numbers in the LoRA adapters of all blocks."""
    return shape.n_layer * sum(rank * shape.n_embd * sum(ADAPTERS[target]) for target in targets)


def moments(numbers: int, bits: int) -> int:
    """Bytes of AdamW's two moments of so many trained numbers."""
    return 2 * (FLOAT * numbers if bits == 32 else numbers + FLOAT * numbers // MOMENT_BLOCK)


def _block(shape: GPT2Config, number: int) -> tuple[int, int]:
    """Bytes a token that attention and MLP of one block keep, where products are in so many bytes a number."""
    D = shape.n_embd
    norm = FLOAT * D + 2 * FLOAT  # its input, mean and deviation
    attention = norm + number * (D + 3 * D + D) + FLOAT * shape.n_head  # normed, q k v, what was seen, its mass
    return attention, norm + number * (D + 4 * D + 4 * D)  # normed, before and after the GELU


def kept(shape: GPT2Config, batch: Batch, *, number: int, checkpointing: bool = False) -> int:
    """What a network's forward pass keeps for its backward pass, and what a block of that takes on top.

    The last block's MLP and the last norm exist only where something is read.
    """
    D, L, N, n = shape.n_embd, shape.n_layer, batch.tokens, batch.read
    attention, mlp = _block(shape, number)
    last = n * 2 * FLOAT * D  # input and output of the last norm
    flow = N * D * (2 * FLOAT + 8 * number)  # gradients on their way through one block
    if checkpointing:
        return L * N * FLOAT * D + N * (attention + mlp) + last + flow
    return L * N * attention + (L - 1) * N * mlp + n * (mlp + number * D) + last + flow


def passing(shape: GPT2Config, tokens: int, *, number: int) -> int:
    """What a forward pass over so many tokens holds at most when nothing is kept: the stream and the widened MLP."""
    return tokens * shape.n_embd * (2 * FLOAT + 8 * number)


def unpacking(shape: GPT2Config, kind: str, *, number: int, device: str) -> int:
    """What frozen weights take while a product reads them: a block as numbers, or under autocast a copy of a matrix."""
    if kind == "float32":
        return 0 if number == FLOAT else number * 4 * shape.n_embd**2
    return min(BLOCK[device], 4 * shape.n_embd**2) * (FLOAT + number)


def casts(shape: GPT2Config, *, number: int) -> int:
    """Copies of trained matrices in autocast's type, which last from the forward to the backward pass."""
    return 0 if number == FLOAT else number * projections(shape)


def head(
    shape: GPT2Config, read: int, *, number: int, device: str, entropy: bool, learns: str = "nothing"
) -> tuple[int, int]:
    """What going from hidden states to log-probabilities takes forward, and backward.

    ``learns`` says which gradients are formed: of nothing, of states, or of the weight too.
    """
    V, D = shape.vocab_size, shape.n_embd
    rows = min(read, max(64, CHUNK[device] // V))
    chunk = FLOAT * rows * V
    fixed = read * D * number + (number * V * D if number != FLOAT else 0)  # scaled states, the weight cast
    if learns == "nothing":
        return fixed + chunk * (2 if entropy else 1), 0
    whole = min(-(-read // rows), KEPT // (rows * V))  # chunks whose exponentials stay
    held = min(whole * chunk, FLOAT * read * V)
    more = 0 if whole * rows >= read else chunk
    forward = fixed + held + max(more, chunk if entropy else 0)
    by_weight = FLOAT * V * D * (2 if number != FLOAT else 1) if learns == "weight" else 0
    cast = rows * V * number if number != FLOAT else 0
    backward = fixed + held + more + by_weight + read * D * FLOAT + cast + (chunk if entropy else 0)
    return forward, backward


def cache(shape: GPT2Config, rows: int, columns: int, *, number: int) -> int:
    """Keys and values of so many rows."""
    return 2 * shape.n_layer * rows * columns * shape.n_embd * number
