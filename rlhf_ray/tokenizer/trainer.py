"""Learning byte-pair merges from text.

Source: Sennrich et al. 2016, over bytes and within GPT-2's words.  Each step merges the most frequent pair of
neighbours; of equally frequent pairs the one with the smaller bytes (left, then right), so the result depends
on the text alone, not on its order.  Every adjacent position counts, overlapping ones too ("aaa" holds the
pair (a, a) twice); within a word merges go from left to right.  A pair seen once is not worth a token.  No
two merges spell the same bytes: what lies between two boundaries has merged the same way in every word.

The counts are kept up to date: a step touches only the words that hold its pair, and a heap whose entries may
be out of date (they are checked when popped) yields the next pair.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

from rlhf_ray.tokenizer.bpe import Tokenizer
from rlhf_ray.tokenizer.vocabulary import BASE_TOKENS, Vocabulary
from rlhf_ray.tokenizer.words import split_words

MIN_PAIR_COUNT = 2

Pair = tuple[int, int]


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs; the texts are consumed one at a time."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split_words(text))
    return counts


class _PairCounts:
    """The distinct words as ids, and the count of every pair of neighbours in them."""

    def __init__(self, word_counts: Mapping[str, int]) -> None:
        byte_ids = {token[0]: i for i, token in enumerate(BASE_TOKENS)}
        self.tokens = list(BASE_TOKENS)
        self.words = [[byte_ids[byte] for byte in word.encode("utf-8")] for word in word_counts]
        self.weights = list(word_counts.values())
        self.counts: defaultdict[Pair, int] = defaultdict(int)
        # Words that hold the pair, or did once: a word without it is passed over when its turn comes.
        self.where: defaultdict[Pair, list[int]] = defaultdict(list)
        for index, (ids, weight) in enumerate(zip(self.words, self.weights, strict=True)):
            for pair in pairwise(ids):
                self.counts[pair] += weight
                self.where[pair].append(index)
        self.heap = [self._entry(pair) for pair in self.counts]
        heapq.heapify(self.heap)

    def _entry(self, pair: Pair) -> tuple[int, bytes, bytes, Pair]:
        return -self.counts[pair], self.tokens[pair[0]], self.tokens[pair[1]], pair

    def pop(self) -> Pair | None:
        """The pair to merge next; None when no pair is left that occurs often enough."""
        while self.heap:
            negative, _, _, pair = heapq.heappop(self.heap)
            count = self.counts.get(pair, 0)
            if count < MIN_PAIR_COUNT:
                continue
            if count == -negative:
                return pair
            heapq.heappush(self.heap, self._entry(pair))
        return None

    def merge(self, pair: Pair) -> None:
        """Append the pair's token and put it in place of the pair in every word."""
        new = len(self.tokens)
        self.tokens.append(self.tokens[pair[0]] + self.tokens[pair[1]])
        changes: defaultdict[Pair, int] = defaultdict(int)
        for index in self.where.pop(pair):
            self._merge_word(index, pair, new, changes)
        del self.counts[pair]
        changes.pop(pair, None)
        for changed, change in changes.items():
            if change:
                self.counts[changed] += change
                if change > 0:
                    heapq.heappush(self.heap, self._entry(changed))

    def _merge_word(self, index: int, pair: Pair, new: int, changes: defaultdict[Pair, int]) -> None:
        """Merge the pair in one word, and note what that does to the counts of its neighbours."""
        left, right = pair
        ids, weight, where = self.words[index], self.weights[index], self.where
        i, last = 0, len(ids) - 1
        while i < last:
            if ids[i] == left and ids[i + 1] == right:
                if i > 0:
                    changes[ids[i - 1], left] -= weight
                    changes[ids[i - 1], new] += weight
                    where[ids[i - 1], new].append(index)
                if i + 1 < last:
                    changes[right, ids[i + 2]] -= weight
                    changes[new, ids[i + 2]] += weight
                    where[new, ids[i + 2]].append(index)
                ids[i : i + 2] = [new]
                last -= 1
            i += 1


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, on_progress: Callable[[int, int], None] | None = None
) -> Tokenizer:
    """Learn a base vocabulary of ``vocab_size`` tokens: 256 bytes and the merges, without special tokens.

    ``on_progress(merges done, merges in all)`` is called after each merge.  ValueError when the size is
    below 256, or the texts are empty or hold too few pairs to fill it.
    """
    if vocab_size < len(BASE_TOKENS):
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least {len(BASE_TOKENS)}, one token per byte")
    word_counts = count_words(texts)
    if not word_counts:
        raise ValueError("the text to train on is empty; give some")
    pairs = _PairCounts(word_counts)
    total = vocab_size - len(BASE_TOKENS)
    merges: list[Pair] = []
    while len(merges) < total:
        pair = pairs.pop()
        if pair is None:
            raise ValueError(
                f"vocab_size is {vocab_size}, but the text has repeated pairs for {len(pairs.tokens)} tokens "
                "only; give more text or a smaller vocabulary"
            )
        pairs.merge(pair)
        merges.append(pair)
        if on_progress is not None:
            on_progress(len(merges), total)
    return Tokenizer(Vocabulary(tokens=tuple(pairs.tokens), merges=tuple(merges)))
