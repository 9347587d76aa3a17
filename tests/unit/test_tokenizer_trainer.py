"""Training: a hand-checked example, equality with a naive trainer, and the same result whatever the order."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.tokenizer import train_bpe
from rlhf_ray.tokenizer.words import split_words


def naive_merges(texts: list[str], limit: int) -> list[tuple[bytes, bytes]]:
    """The same rule, everything counted afresh at every step."""
    words = Counter(tuple(bytes([b]) for b in word.encode()) for text in texts for word in split_words(text))
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < limit:
        counts: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                counts[pair] += count
        allowed = [(-n, pair) for pair, n in counts.items() if n >= 2]
        if not allowed:
            break
        pair = min(allowed)[1]
        merges.append(pair)
        merged: Counter[tuple[bytes, ...]] = Counter()
        for word, count in words.items():
            out: list[bytes] = []
            i = 0
            while i < len(word):
                step = 2 if word[i : i + 2] == pair else 1
                out.append(b"".join(word[i : i + step]))
                i += step
            merged[tuple(out)] += count
        words = merged
    return merges


def learnt(texts: list[str], merges: int) -> list[tuple[bytes, bytes]]:
    vocabulary = train_bpe(texts, 256 + merges).vocabulary
    return [(vocabulary.tokens[a], vocabulary.tokens[b]) for a, b in vocabulary.merges]


def test_hand_checked_example() -> None:
    # aa 4 times; then (a, b) before (aa, a), both twice; then (aa, ab) twice; every other pair once.
    tokenizer = train_bpe(["aaabdaaabac"], 259)
    assert tokenizer.vocabulary.tokens[256:] == (b"aa", b"ab", b"aaab")
    assert tokenizer.encode("aaabdaaabac") == [258, 67, 258, 64, 66]
    assert tokenizer.encode("aab") == [256, 65]
    with pytest.raises(ValueError, match="vocab_size is 260, but the text has repeated pairs for 259 tokens only"):
        train_bpe(["aaabdaaabac"], 260)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("ab é", max_size=60), min_size=1, max_size=4))
def test_equals_the_naive_trainer(texts: list[str]) -> None:
    expected = naive_merges(texts, 30)
    if any(texts):
        assert learnt(texts, len(expected)) == expected


def test_equals_the_naive_trainer_on_a_longer_text() -> None:
    rng = random.Random(0)
    syllables = ["ka", "ro", "mi", "na", "to", "shi", "ba", "nana", "aa"]
    texts = [" ".join("".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(300)) for _ in range(3)]
    expected = naive_merges(texts, 120)
    assert len(expected) == 120
    assert learnt(texts, 120) == expected


def test_order_of_the_texts_does_not_matter() -> None:
    texts = ["the cat sat on the mat", "the dog sat", "a cat, a dog; a mat!"] * 2
    first = train_bpe(texts, 270)
    assert train_bpe(iter(texts[::-1]), 270).fingerprint == first.fingerprint


def test_progress_counts_merges() -> None:
    seen: list[tuple[int, int]] = []
    train_bpe(["abababab cdcdcd"], 259, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_sizes_and_texts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 255; it must be at least 256"):
        train_bpe(["text"], 255)
    with pytest.raises(ValueError, match="the text to train on is empty"):
        train_bpe(["", ""], 300)
    assert train_bpe(["text"], 256).vocabulary.merges == ()
