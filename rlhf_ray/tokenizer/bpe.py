"""Byte-level byte-pair encoding, as GPT-2's: text to ids and back, exactly.

Source: Sennrich et al. 2016 (merges), Radford et al. 2019 (over bytes, within words).  Within a word the pair
with the lowest rank merges first, the leftmost of equals first.  Special ids follow the base vocabulary; text
can't yield one, whatever it says, because text only ever becomes base tokens.

Left out on purpose: normalisation, dropout, and any way to parse special tokens out of text (see
templates.py).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from rlhf_ray.tokenizer.vocabulary import (
    SPECIAL_TOKENS,
    Vocabulary,
    read_vocabulary,
    to_chars,
    write_vocabulary,
)
from rlhf_ray.tokenizer.words import split_words

MAX_CACHED_WORDS = 1 << 17
MAX_CACHED_CHARS = 64
_LONG_WORD = 64  # bytes; above it a heap beats rescanning the ranks
_NO_RANK = 1 << 60


class _WordCache(dict[str, tuple[int, ...]]):
    """The ids of words seen before; computes an absent one, and starts over when full."""

    def __init__(self, compute: Callable[[str], tuple[int, ...]]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self._compute(word)
        if len(word) <= MAX_CACHED_CHARS:
            if len(self) >= MAX_CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


class Tokenizer:
    """A vocabulary with its special tokens; immutable but for its cache, cheap to send to another process."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        ids = {token: i for i, token in enumerate(vocabulary.tokens)}
        assert len(ids) == len(vocabulary.tokens), "two ids spell the same bytes"
        self._byte_ids = [ids[bytes([byte])] for byte in range(256)]
        self._ranks = {pair: rank for rank, pair in enumerate(vocabulary.merges)}
        self._merged = [ids[vocabulary.tokens[a] + vocabulary.tokens[b]] for a, b in vocabulary.merges]
        self._cache = _WordCache(self._encode_word)
        self.base_size = len(vocabulary.tokens)
        self.special_tokens = {name: self.base_size + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = self.base_size + len(SPECIAL_TOKENS)
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = range(self.base_size, self.base_size + 4)
        self.user_id, self.assistant_id, self.system_id = range(self.base_size + 4, self.vocab_size)
        base = dict(enumerate(vocabulary.tokens))
        self._content = base | dict.fromkeys(self.special_tokens.values(), b"")
        self._verbatim = base | {i: name.encode() for name, i in self.special_tokens.items()}

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Vocabulary]]:
        return Tokenizer, (self.vocabulary,)

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read vocab.json and merges.txt of a folder; ValueError when one is missing or malformed."""
        return cls(read_vocabulary(folder))

    def save(self, folder: Path | str) -> None:
        """Write vocab.json and merges.txt (the base vocabulary, without special tokens) into a folder."""
        write_vocabulary(folder, self.vocabulary)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex digest of vocabulary and merges: equal for tokenizers that give equal ids."""
        digest = hashlib.sha256()
        digest.update("\n".join(map(to_chars, self.vocabulary.tokens)).encode())
        digest.update(("\n\n" + "\n".join(f"{a} {b}" for a, b in self.vocabulary.merges)).encode())
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of the text, each below ``base_size``; ValueError when the text is not valid Unicode."""
        cache = self._cache
        try:
            return [i for word in split_words(text) for i in cache[word]]
        except UnicodeEncodeError as error:
            bad = error.object[error.start]
            raise ValueError(
                f"text holds the lone surrogate U+{ord(bad):04X} at character {text.index(bad)}, which is "
                "not valid Unicode; repair or drop the text"
            ) from error

    def token_bytes(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        """The bytes that ids spell, none for a special one unless ``skip_special`` is False.

        Raises ValueError for an id outside the vocabulary.
        """
        table = self._content if skip_special else self._verbatim
        try:
            return b"".join([table[i] for i in ids])
        except KeyError as error:
            raise ValueError(
                f"token id {error.args[0]} is not in the vocabulary (0 to {self.vocab_size - 1}); "
                "use the tokenizer that the ids were made with"
            ) from error

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of the ids, U+FFFD for what is not UTF-8; ValueError for an id outside the vocabulary."""
        return self.token_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def _encode_word(self, word: str) -> tuple[int, ...]:
        ids = [self._byte_ids[byte] for byte in word.encode("utf-8")]
        return tuple(self._merge_long(ids) if len(ids) > _LONG_WORD else self._merge_short(ids))

    def _merge_short(self, ids: list[int]) -> list[int]:
        """Merge by rescanning the ranks: quadratic, and the fastest for a word."""
        get = self._ranks.get
        ranks = [get(pair, _NO_RANK) for pair in pairwise(ids)]
        while ranks and (best := min(ranks)) != _NO_RANK:
            i = ranks.index(best)
            ids[i : i + 2] = [self._merged[best]]
            del ranks[i]
            if i > 0:
                ranks[i - 1] = get((ids[i - 1], ids[i]), _NO_RANK)
            if i < len(ranks):
                ranks[i] = get((ids[i], ids[i + 1]), _NO_RANK)
        return ids

    def _merge_long(self, ids: list[int]) -> list[int]:
        """Merge by a heap over a linked list: n log n, so that a megabyte without a space is no trap."""
        get = self._ranks.get
        end = len(ids)
        before, after = list(range(-1, end - 1)), list(range(1, end + 1))
        heap = [(rank, i) for i, pair in enumerate(pairwise(ids)) if (rank := get(pair)) is not None]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            # An entry is stale when its left half was absorbed (-1) or either half has grown since.
            if ids[i] < 0 or j == end or get((ids[i], ids[j])) != rank:
                continue
            ids[i], ids[j] = self._merged[rank], -1
            after[i] = k = after[j]
            if k < end:
                before[k] = i
                if (right := get((ids[i], ids[k]))) is not None:
                    heapq.heappush(heap, (right, i))
            h = before[i]
            if h >= 0 and (left := get((ids[h], ids[i]))) is not None:
                heapq.heappush(heap, (left, h))
        return [i for i in ids if i >= 0]
