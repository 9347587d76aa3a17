"""Encode and decode: ids equal the libraries' on GPT-2's vocabulary, round trips are exact."""

from __future__ import annotations

import copy
import gzip
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from rlhf_ray.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer, bpe, train_bpe
from rlhf_ray.tokenizer.words import split_words

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXT = "The cat's hat isn't that cat's, is it? 1999 cats ate 2,000 hats; naïve café, 你好, 😀!\n\n\tthe the "
PIECES = [
    *(
        "'s",
        "'S",
        "'ll",
        "''",
        "'re ",
        "don't",
        "x'd",
        " '",
        "\u2019s",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\x0b",
        "\x1c",
        "\x85",
    ),
    *(
        "\u00a0",
        "\u2028",
        "\u3000",
        "\u200b",
        "\ufeff",
        "\0",
        "a",
        " A",
        "é",
        "e\u0301",
        "ﬁ",
        "ß",
        "1",
        "½",
        "٣",
        "Ⅷ",
    ),
    *("你好", "한국", "हिन्दी", "עברית", "😀", "👩\u200d👩\u200d👧", "🇩🇪", "!!", "...", "—", "\ufffd"),
    *("<|eos|>", "<|pad|>", "<|user|>"),
    # Later than Unicode 16:
    *("\u0558", "\U0003d000", "\U00010940", "\U00011de1", "\u088f", "\ua7ce", "\U000323b0"),
]
unicode_text = st.one_of(
    st.text(), st.text("abc '\n\t12.!é", max_size=40), st.lists(st.sampled_from(PIECES)).map("".join)
)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    """A tokenizer learnt from a few lines."""
    return train_bpe([TEXT, TEXT], 256 + 40)


@pytest.fixture(scope="session")
def gpt2(test_data: Path) -> Tokenizer:
    """GPT-2's own vocabulary."""
    return Tokenizer.load(test_data / "tokenizer")


@pytest.fixture(scope="session")
def peers(test_data: Path) -> tuple[tokenizers.Tokenizer, tiktoken.Encoding]:
    """The same vocabulary in the two libraries."""
    vocab: dict[str, int] = json.loads((test_data / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    byte_of = {char: byte for byte, char in library_alphabet().items()}
    ranks = {bytes(byte_of[c] for c in name): i for name, i in vocab.items() if name != "<|endoftext|>"}
    encoding = tiktoken.Encoding("gpt2-local", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return tokenizers.Tokenizer.from_file(str(test_data / "tokenizer/tokenizer.json")), encoding


def library_alphabet() -> dict[int, str]:
    """GPT-2's byte alphabet, recovered from the library: it writes any character's UTF-8 bytes in it."""
    alphabet: dict[int, str] = {}
    pre = ByteLevel(add_prefix_space=False, use_regex=False)
    for code in [*range(0x800), *range(0x800, 0xD800, 64), *range(0x10000, 0x110000, 0x1000)]:
        text = chr(code)
        alphabet |= dict(zip(text.encode(), pre.pre_tokenize_str(text)[0][0], strict=True))
    # C0, C1 and F5-FF never occur in UTF-8; the printable ones stand for themselves.
    return alphabet | {byte: chr(byte) for byte in range(256) if byte not in alphabet}


def assert_same(text: str, gpt2: Tokenizer, peers: tuple[tokenizers.Tokenizer, tiktoken.Encoding]) -> None:
    ids = gpt2.encode(text)
    assert ids == peers[0].encode(text, add_special_tokens=False).ids
    assert ids == peers[1].encode_ordinary(text)
    assert gpt2.decode(ids) == text


@settings(max_examples=400, deadline=None)
@given(unicode_text)
def test_fuzzed_unicode_equals_both_libraries(gpt2: Tokenizer, peers: Any, text: str) -> None:
    assert_same(text.replace("<|endoftext|>", ""), gpt2, peers)


def test_real_corpora_equal_both_libraries(gpt2: Tokenizer, peers: Any, test_data: Path) -> None:
    with gzip.open(test_data / "pretrain/imdb_train.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(next(file))["text"] for _ in range(200)]
    with gzip.open(test_data / "sft/sgd_dev_messages.jsonl.gz", "rt", encoding="utf-8") as file:
        texts += [message["content"] for _ in range(50) for message in json.loads(next(file))["messages"]]
    texts.append((test_data / "pretrain/tinyshakespeare.txt").read_text(encoding="utf-8")[:100_000])
    texts.append((test_data / "pretrain/wikitext2_valid.txt").read_text(encoding="utf-8")[:100_000])
    for text in texts:
        assert_same(text, gpt2, peers)


@pytest.mark.parametrize("text", ["a" * 70, "ab" * 5000, "supercalifragilistic" * 300, "!" * 3000, " " * 999 + "x"])
def test_long_words_equal_both_libraries(gpt2: Tokenizer, peers: Any, text: str) -> None:
    assert_same(text, gpt2, peers)


def test_known_ids(gpt2: Tokenizer) -> None:
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert (gpt2.base_size, gpt2.vocab_size) == (50257, 50264)
    names = ["pad", "bos", "eos", "unk", "user", "assistant", "system"]
    assert [getattr(gpt2, f"{name}_id") for name in names] == list(range(50257, 50264))


def test_words_of_every_letter_number_and_space_equal_the_library() -> None:
    special = regex.compile(r"[\p{L}\p{N}\s]")
    # All small blocks and all newer characters; every 11th of the large CJK blocks and of what is neither.
    codes = [
        c
        for c in range(0x110000)
        if not 0xD800 <= c < 0xE000
        and (c % 11 == 0 or (special.match(chr(c)) and (c < 0x3400 or unicodedata.category(chr(c)) == "Cn")))
    ]
    pre = ByteLevel(add_prefix_space=False)
    for start in range(0, len(codes), 5000):
        text = "".join(f"a{chr(c)}1{chr(c)}!{chr(c)} {chr(c)}\n" for c in codes[start : start + 5000])
        theirs = [text[a:b] for _, (a, b) in pre.pre_tokenize_str(text)]
        assert split_words(text) == theirs
    for code in codes:
        if unicodedata.category(chr(code)) == "Cn":  # each alone: one newer character can't stand in for another
            text = f"a{chr(code)}1"
            assert split_words(text) == [text[a:b] for _, (a, b) in pre.pre_tokenize_str(text)]


@settings(max_examples=300, deadline=None)
@given(unicode_text)
def test_words_equal_the_plain_pattern_on_ascii_and_join_to_the_text(text: str) -> None:
    assert "".join(split_words(text)) == text
    ascii_text = text.encode("ascii", "ignore").decode()
    assert split_words(ascii_text) == regex.findall(GPT2_PATTERN, ascii_text)


@settings(max_examples=300, deadline=None)
@given(unicode_text)
def test_round_trip_is_exact_and_never_special(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert all(i < small.base_size for i in ids)


@given(st.text("abct he'", max_size=200))
def test_both_ways_of_merging_agree(small: Tokenizer, text: str) -> None:
    ids = [small.encode(char)[0] for char in text]
    assert small._merge_short(list(ids)) == small._merge_long(list(ids))


def test_special_tokens_in_text_are_plain_text(small: Tokenizer) -> None:
    for name in SPECIAL_TOKENS:
        assert small.decode(small.encode(name)) == name
    ids = [small.bos_id, *small.encode("the<|eos|>"), small.eos_id]
    assert small.decode(ids) == "the<|eos|>"
    assert small.decode(ids, skip_special=False) == "<|bos|>the<|eos|><|eos|>"


def test_bad_ids_and_bad_text_are_refused(small: Tokenizer) -> None:
    for bad in (-1, small.vocab_size):
        with pytest.raises(ValueError, match=rf"token id {bad} is not in the vocabulary \(0 to 302\)"):
            small.decode([bad])
    with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at character 3"):
        small.encode("ab \ud83d!")


def test_cache_is_bounded_and_does_not_change_ids(small: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f" w{i}" for i in range(100)]
    expected = [small.encode(word) for word in words]
    monkeypatch.setattr(bpe, "MAX_CACHED_WORDS", 8)
    tight = Tokenizer(small.vocabulary)
    assert [tight.encode(word) for word in words * 2] == expected * 2
    assert 0 < len(tight._cache) <= 8
    tight.encode("x" * 1000)
    assert "x" * 1000 not in tight._cache


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 302)), st.booleans())
def test_streamed_text_equals_decoded(small: Tokenizer, ids: list[int], skip: bool) -> None:
    stream = StreamDecoder(small, skip_special=skip)
    for _ in range(2):  # it can be used again after a flush
        assert "".join([*map(stream.push, ids), stream.flush()]) == small.decode(ids, skip_special=skip)


def test_stream_never_emits_half_a_character(small: Tokenizer) -> None:
    stream = StreamDecoder(small)
    byte_ids = [small.vocabulary.tokens.index(bytes([b])) for b in "é😀".encode()]
    assert [stream.push(i) for i in byte_ids] == ["", "é", "", "", "", "😀"]
    assert [stream.push(i) for i in byte_ids[2:4]] == ["", ""]
    assert stream.flush() == "\ufffd"


def test_saved_vocabulary_loads_equal(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    assert loaded.vocabulary == small.vocabulary
    assert loaded.fingerprint == small.fingerprint
    assert len(loaded.fingerprint) == 64
    assert train_bpe([TEXT, TEXT], 256 + 39).fingerprint != small.fingerprint
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["merges.txt", "vocab.json"]
    assert copy.deepcopy(small).encode(TEXT) == small.encode(TEXT)


def test_gpt2_files_survive_a_round_trip(gpt2: Tokenizer, test_data: Path, tmp_path: Path) -> None:
    gpt2.save(tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_bytes()) == json.loads(
        (test_data / "tokenizer/vocab.json").read_bytes()
    )
    assert (tmp_path / "merges.txt").read_text().split() == (test_data / "tokenizer/merges.txt").read_text().split()


def test_special_tokens_at_the_end_of_vocab_json_are_not_counted_twice(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | small.special_tokens))
    assert Tokenizer.load(tmp_path).vocabulary == small.vocabulary


BREAK_VOCAB = {
    "not JSON": (lambda v: "{", "vocab.json: not valid JSON"),
    "a list": (lambda v: "[]", "vocab.json: must be one JSON object"),
    "gap": (lambda v: json.dumps({k: i + (i > 5) for k, i in v.items()}), "id 6 is not there"),
    "text id": (lambda v: json.dumps(v | {"!": "0"}), "vocab.json: must be one JSON object"),
    "no byte": (
        lambda v: json.dumps({("<x>" if k == "!" else k): i for k, i in v.items()}),
        "one-byte token '!'",
    ),
    "foreign": (lambda v: json.dumps(v | {"▁the": len(v)}), "not a character of GPT-2's byte alphabet"),
    "unmade": (lambda v: json.dumps(v | {"zq": len(v)}), "no merge makes 'zq'"),
    "special": (lambda v: json.dumps(v | {"<|eos|>": len(v)}), "<|eos|> is at id"),
}
BREAK_MERGES = {
    "one token": ("t\n", "merges.txt:3: expected two tokens"),
    "unknown": ("t Ġq\n", "merges.txt:3: 'Ġq' is not in vocab.json"),
}


@pytest.mark.parametrize("case", BREAK_VOCAB)
def test_broken_vocab_json_is_named(small: Tokenizer, tmp_path: Path, case: str) -> None:
    small.save(tmp_path)
    change, message = BREAK_VOCAB[case]
    path = tmp_path / "vocab.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=re.escape(message)):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("case", BREAK_MERGES)
def test_broken_merges_are_named(small: Tokenizer, tmp_path: Path, case: str) -> None:
    small.save(tmp_path)
    line, message = BREAK_MERGES[case]
    path = tmp_path / "merges.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(ValueError, match=re.escape(message)):
        Tokenizer.load(tmp_path)


def test_missing_cut_and_repeated_merges_are_named(small: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab\.json: no such file"):
        Tokenizer.load(tmp_path)
    small.save(tmp_path)
    path = tmp_path / "merges.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-5]))
    with pytest.raises(ValueError, match=r"merges\.txt: no merge makes .* cut short"):
        Tokenizer.load(tmp_path)
    path.write_text("".join([*lines, lines[-1]]))
    with pytest.raises(ValueError, match=r"merges\.txt:42: the merge .* appears a second time"):
        Tokenizer.load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"merges\.txt: no such file"):
        Tokenizer.load(tmp_path)


def test_importing_the_tokenizer_does_not_import_torch(repository: Path) -> None:
    code = "import sys, rlhf_ray.tokenizer.command; print(sorted({'torch', 'rich', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
