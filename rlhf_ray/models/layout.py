"""Where the real tokens of a batch are, so that nothing is computed on padding.

Everything but attention works on the N real tokens as (N, D).  Attention takes documents one behind the other where
the compiled library serves (``native/attention.cpp``).  Elsewhere it needs documents as rows: they are put into
right-padded grids of documents of like length, where plain causality suffices, because no token sees what comes after
it.  Grids that documents fill are views.

A layout is worked out on the host, from masks that live there if they can: a mask on a GPU costs one wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_ray.native import training

LIKE = 0.75
"""Documents share a grid when the shortest has this share of the longest's tokens."""
SMALL = 2048
"""They also share one of up to so many cells: a second attention costs more than the padding of a small one."""


class _Take(torch.autograd.Function):
    """Rows ``index`` (n,) of x (N, ...), each taken at most once: its gradient needs no addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, *gradient.shape[1:]).index_copy_(0, index, gradient), None


class _Put(torch.autograd.Function):
    """Zeros (rows, ...) with x (n, ...) in the rows ``index`` (n,), each given at most once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gradient.index_select(0, index), None, None


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (n,) of x (N, ...): (n, ...); no row twice."""
    taken: Tensor = _Take.apply(x, index)
    return taken


def put(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """x (n, ...) as the rows ``index`` (n,) of zeros (rows, ...); no row twice."""
    grid: Tensor = _Put.apply(x, index, rows)
    return grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Documents of like length as the rows of one attention."""

    tokens: int
    documents: int
    width: int
    """Tokens of the longest document."""
    cells: Tensor | None
    """(tokens,) cell of each token in the grid as (documents * width,); None when every cell is taken."""

    def attend(self, qkv: Tensor, dropout: float) -> Tensor:
        """Causal attention in each document: (tokens, 3, H, d) -> (tokens, H, d)."""
        H, d = qkv.shape[2:]
        cells = qkv if self.cells is None else put(qkv, self.cells, self.documents * self.width)
        rows = cells.view(self.documents, self.width, 3, H, d)
        q, k, v = (x.transpose(1, 2) for x in rows.unbind(2))  # (documents, H, width, d) each
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        out = out.transpose(1, 2).reshape(-1, H, d)  # (documents * width, H, d)
        return out if self.cells is None else take(out, self.cells)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The N real tokens of a (B, T) batch, document by document, the longest first."""

    shape: tuple[int, int]
    """B and T."""
    places: Tensor
    """(N,) int64: each token's place in the batch as (B * T,)."""
    positions: Tensor
    """(N,) int64: each token's position in its document."""
    lengths: tuple[int, ...]
    """Tokens of each document."""
    read: Tensor | None
    """(n,) int64: which of the N hidden states are asked for, by their places; None asks for all, in order."""

    @classmethod
    def of(cls, documents: Tensor, *, read: Tensor | None = None, device: torch.device | str = "cpu") -> Layout:
        """The layout of documents (B, T), contiguous runs of one id; 0 is padding, on any side.

        An attention mask is one document a row.  ``read`` (B, T) bool marks real tokens whose hidden states
        are asked for.
        """
        ids = documents.cpu()
        B, T = ids.shape
        ids = ids.flatten().long()
        begins = F.pad(ids[1:] != ids[:-1], (1, 0), value=True)
        begins[::T] = True
        begins &= ids != 0
        places = (ids != 0).nonzero()[:, 0]  # (N,)
        starts = begins.nonzero()[:, 0]  # (documents,)
        document = begins.cumsum(0)[places] - 1  # (N,)
        lengths = document.bincount(minlength=len(starts))
        by_length = lengths.argsort(descending=True, stable=True)
        order = by_length.argsort()[document].argsort(stable=True)  # (N,)
        places, positions = places[order], (places - starts[document])[order]
        return cls(
            shape=(B, T),
            places=places.to(device, non_blocking=True),
            positions=positions.to(device, non_blocking=True),
            lengths=tuple(lengths[by_length].tolist()),
            read=None if read is None else _find(read.cpu().flatten(), places).to(device, non_blocking=True),
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths, default=0)

    @cached_property
    def bounds(self) -> Tensor:
        """(documents + 1,) int64 on the CPU: document i is the tokens from bounds[i] to bounds[i + 1]."""
        return torch.tensor([0, *self.lengths]).cumsum(0)

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """The documents, in order."""
        return _grids(self.lengths, self.positions)

    def flat(self, x: Tensor) -> Tensor:
        """What x (B, T) holds of each token: (N,)."""
        return x.flatten()[self.places]

    def batch(self, states: Tensor) -> Tensor:
        """States (N, D) back in their places: (B, T, D), zeros elsewhere."""
        B, T = self.shape
        return put(states, self.places, B * T).view(B, T, -1)

    def attend(self, layer: int, qkv: Tensor, dropout: float) -> Tensor:
        """Causal attention inside every document, the same in every layer: (N, 3, H, d) -> (N, H, d)."""
        if training.serves(qkv) and qkv.shape[-1] % training.LANES == 0 and not dropout:
            return training.attention(qkv, self.bounds)
        if len(self.grids) == 1:
            return self.grids[0].attend(qkv, dropout)
        parts = qkv.split([grid.tokens for grid in self.grids])
        return torch.cat([grid.attend(part, dropout) for grid, part in zip(self.grids, parts, strict=True)])


def _find(read: Tensor, places: Tensor) -> Tensor:
    """Index (n,) into ``places`` (N,) of each marked place of read (B * T,), in the order of the places."""
    index = torch.full((len(read),), -1)
    index[places] = torch.arange(len(places))
    found = index[read]
    assert (found >= 0).all(), "a hidden state is asked for where there is padding"
    return found


def _grids(lengths: tuple[int, ...], positions: Tensor) -> tuple[Grid, ...]:
    """Grids of documents of falling lengths, whose tokens have the given positions (N,)."""
    grids = []
    first = token = 0
    while first < len(lengths):
        width, last = lengths[first], first
        while last < len(lengths) and (lengths[last] >= LIKE * width or (last + 1 - first) * width <= SMALL):
            last += 1
        tokens, documents = sum(lengths[first:last]), last - first
        cells = None
        if tokens < documents * width:
            row = torch.arange(documents).repeat_interleave(torch.tensor(lengths[first:last]))  # (tokens,)
            starts = (row * width).to(positions.device, non_blocking=True)
            cells = starts + positions[token : token + tokens]
        grids.append(Grid(tokens=tokens, documents=documents, width=width, cells=cells))
        first, token = last, token + tokens
    return tuple(grids)
