"""Several documents in one row, so that no computation goes into padding.

Best-fit decreasing: documents from longest to shortest, each into the fullest row that still has room.  It
needs at most 11/9 of the fewest possible rows plus 4 (Johnson et al. 1974) and, unlike cutting a stream at
fixed places, never splits a document (Ding et al. 2024, arXiv:2404.10830).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Rows of documents, right-padded."""

    tokens: np.ndarray
    """(N, T) int64."""
    document_ids: np.ndarray
    """(N, T) int64: 1, 2, ... along the row; 0 is padding."""
    weights: np.ndarray
    """(N, T) float32: weight of token t as a target; 0 at the first token of a document and in padding."""

    def __len__(self) -> int:
        return self.tokens.shape[0]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group items into bins of at most ``capacity``, best-fit decreasing; equal inputs give equal bins.

    O(n log n): bins are kept by the room left in them, and the tightest fit is found by bisection.
    Raises ValueError when an item is empty or longer than the capacity.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"document {index} has {length} tokens, expected 1 to {capacity}: cut or drop it")
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> bins with that room
    rooms: list[int] = []  # keys of by_room in order; never more than the capacity
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[index])
        if at < len(rooms):
            room = rooms[at]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
            bins[chosen].append(index)
        else:
            room, chosen = capacity, len(bins)
            bins.append([index])
        left = room - lengths[index]
        if left == 0:
            continue
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(chosen)
    return bins


def pack(
    documents: Sequence[Sequence[int]],
    length: int,
    *,
    weights: Sequence[Sequence[float]] | None = None,
    pad_id: int = 0,
) -> Packed:
    """Pack documents of token ids into rows of ``length`` tokens.

    ``weights`` gives each token's weight as a target (default 1); a document's first token is never a target,
    for nothing of its own document stands before it.
    Raises ValueError when a document is empty or longer than ``length``, or its weights don't match it.
    """
    bins = best_fit([len(document) for document in documents], length)
    tokens = np.full((len(bins), length), pad_id, np.int64)
    document_ids = np.zeros((len(bins), length), np.int64)
    target = np.zeros((len(bins), length), np.float32)
    for row, members in enumerate(bins):
        start = 0
        for number, index in enumerate(members, 1):
            document = documents[index]
            end = start + len(document)
            tokens[row, start:end] = document
            document_ids[row, start:end] = number
            own = (1.0,) * len(document) if weights is None else weights[index]
            if len(own) != len(document):
                raise ValueError(f"document {index} has {len(document)} tokens but {len(own)} weights")
            target[row, start + 1 : end] = own[1:]
            start = end
    return Packed(tokens=tokens, document_ids=document_ids, weights=target)
