"""A preallocated cache of keys and values, one length per row.

Rows grow to the right from column 0; what lies beyond a row's length is never attended to.

Left out on purpose: paging (rows are compacted instead) and quantisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COLUMN_BLOCK = 16
"""Attention reads whole blocks of columns: a row's float32 sums don't depend on other rows' lengths."""


def round_up(n: int, block: int) -> int:
    """The smallest multiple of block that is at least n."""
    return -(-n // block) * block


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStep:
    """Where the T tokens of one forward pass go, and what they see."""

    cache: KVCache
    positions: Tensor
    """(B, T) int64: column, and so position, of each new token."""
    index: Tensor
    """(B * H * T,) int64: the same columns in a layer's keys flattened to (B * H * capacity, head_dim)."""
    mask: Tensor | None
    """(B, 1, T, columns) bool: columns that each token sees; None for plain causality in an empty cache."""
    columns: int
    """Columns read."""
    longest: int
    """Upper bound of the rows' lengths after this pass."""

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v (B, H, T, head_dim) of one layer; return the keys and values to attend to."""
        head_dim = k.shape[-1]
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.view(-1, head_dim).index_copy_(0, self.index, k.reshape(-1, head_dim))
        values.view(-1, head_dim).index_copy_(0, self.index, v.reshape(-1, head_dim))
        if self.mask is None:
            return k, v
        return keys[:, :, : self.columns], values[:, :, : self.columns]


@dataclass(slots=True, kw_only=True)
class KVCache:
    """Keys and values of every layer for B rows."""

    keys: Tensor
    """(n_layer, B, H, capacity, head_dim)."""
    values: Tensor
    """(n_layer, B, H, capacity, head_dim)."""
    lengths: Tensor
    """(B,) int64: tokens held by each row."""
    rows: Tensor | None = None
    """(B,) rows of ``keys`` that these are, while they are being filled; None when they are all, in order."""
    longest: int = 0
    """Upper bound of ``lengths`` known without asking the device; who knows a tighter one may set it."""

    @classmethod
    def empty(
        cls,
        *,
        n_layer: int,
        rows: int,
        n_head: int,
        capacity: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> KVCache:
        """A cache with no tokens in it; the capacity is rounded up to whole blocks of columns."""
        shape = (n_layer, rows, n_head, round_up(capacity, COLUMN_BLOCK), head_dim)
        # Zeros, not empty memory: a masked column is multiplied by 0, and 0 * NaN would be NaN.
        return cls(
            keys=torch.zeros(shape, device=device, dtype=dtype),
            values=torch.zeros(shape, device=device, dtype=dtype),
            lengths=torch.zeros(rows, device=device, dtype=torch.int64),
        )

    @property
    def capacity(self) -> int:
        """Columns of each row."""
        return self.keys.shape[3]

    def suits(self, rows: int, capacity: int, weight: Tensor) -> bool:
        """Whether it holds so many rows of so many columns, for a model with such weights."""
        enough = len(self.lengths) >= rows and self.capacity >= capacity
        return enough and self.keys.dtype == weight.dtype and self.keys.device == weight.device

    def first(self, rows: int) -> KVCache:
        """The first rows, sharing memory with this cache."""
        return KVCache(
            keys=self.keys[:, :rows],
            values=self.values[:, :rows],
            lengths=self.lengths[:rows],
            longest=self.longest,
        )

    def at(self, rows: Tensor) -> KVCache:
        """The given rows (n,) as empty ones, to be filled by one pass, which leaves ``lengths`` here alone."""
        return KVCache(keys=self.keys, values=self.values, lengths=torch.zeros_like(rows), rows=rows)

    def begin(self, T: int) -> CacheStep:
        """Plan a forward pass of T more tokens per row; ValueError when they don't fit."""
        assert self.rows is None or not self.longest, "scattered rows are filled in one pass, not read"
        longest = self.longest + T
        if longest > self.capacity:
            raise ValueError(f"row length {longest} exceeds the cache's capacity {self.capacity}: allocate more")
        _, B, H, capacity, _ = self.keys.shape
        device = self.keys.device
        positions = self.lengths[:, None] + torch.arange(T, device=device)  # (B, T)
        heads = torch.arange(0, B * H * capacity, capacity, device=device).view(B, H, 1)
        if self.rows is not None:
            heads = heads[self.rows]
        columns = round_up(longest, COLUMN_BLOCK)
        mask = None
        if self.longest:
            mask = (torch.arange(columns, device=device) <= positions[:, :, None])[:, None]
        index = (heads + positions[:, None, :]).view(-1)
        return CacheStep(cache=self, positions=positions, index=index, mask=mask, columns=columns, longest=longest)

    def advance(self, T: int, attention_mask: Tensor | None) -> None:
        """Count the tokens of a pass: T per row, or the real ones of an ``attention_mask`` (B, T)."""
        self.lengths += T if attention_mask is None else (attention_mask != 0).sum(1)
        self.longest += T

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows ``source`` (n,) over rows ``target`` (n,); the two must not overlap."""
        for store in (self.keys, self.values):
            store[:, target, :, : self.longest] = store[:, source, :, : self.longest]
        self.lengths[target] = self.lengths[source]
