"""A byte-level vocabulary and its two files, in GPT-2's format.

``vocab.json`` maps each token to its id, ``merges.txt`` lists the merges, the first learnt first; both write
a byte as one printable character (Radford et al. 2019).  The files hold the base vocabulary: the special
tokens are implied to follow it.  A ``vocab.json`` that ends with exactly our special tokens is read as the
base before them.

Left out on purpose: other tokenizer formats (SentencePiece, tiktoken's rank files).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|system|>")


def _byte_alphabet() -> dict[int, str]:
    """Each byte's character, in GPT-2's order: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_TO_CHAR = _byte_alphabet()
_CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}
BASE_TOKENS = tuple(bytes([byte]) for byte in BYTE_TO_CHAR)
"""The 256 one-byte tokens, in the order of their ids in GPT-2's vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The base vocabulary: what each id spells, and which neighbours merge first."""

    tokens: tuple[bytes, ...]
    """What each id spells, by id."""
    merges: tuple[tuple[int, int], ...]
    """Pairs of ids that merge into the token that spells both, the most urgent first."""


def to_chars(token: bytes) -> str:
    """Write bytes in the printable alphabet of the files."""
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; a tokenizer folder holds vocab.json and merges.txt "
            "(train one with: python launch/tokenizer.py train)"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); copy the file again") from error


def _read_tokens(path: Path) -> tuple[bytes, ...]:
    """The base tokens of a vocab.json, by id."""
    try:
        vocab: Any = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy the file again") from error
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError(f"{path}: must be one JSON object that maps each token to its id")
    names = sorted(vocab, key=vocab.__getitem__)
    for expected, name in enumerate(names):
        if vocab[name] != expected:
            raise ValueError(f"{path}: ids must be 0 to {len(names) - 1}, each once, but id {expected} is not there")
    if tuple(names[-len(SPECIAL_TOKENS) :]) == SPECIAL_TOKENS:
        names = names[: -len(SPECIAL_TOKENS)]
    if misplaced := [name for name in SPECIAL_TOKENS if name in vocab and vocab[name] < len(names)]:
        raise ValueError(
            f"{path}: {misplaced[0]} is at id {vocab[misplaced[0]]}; remove the special tokens, "
            "they are implied after the base vocabulary"
        )
    try:
        tokens = tuple(bytes(map(_CHAR_TO_BYTE.__getitem__, name)) for name in names)
    except KeyError as error:
        raise ValueError(
            f"{path}: {error.args[0]!r} is not a character of GPT-2's byte alphabet; "
            "only byte-level vocabularies can be read"
        ) from error
    if missing := set(BASE_TOKENS) - set(tokens):
        raise ValueError(f"{path}: the one-byte token {to_chars(min(missing))!r} is missing; all 256 are required")
    return tokens


def _read_merges(path: Path, tokens: tuple[bytes, ...]) -> tuple[tuple[int, int], ...]:
    """The merges of a merges.txt as pairs of ids."""
    ids = {to_chars(token): i for i, token in enumerate(tokens)}
    lines = _read(path).split("\n")
    merges: dict[tuple[int, int], None] = {}
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise ValueError(f"{path}:{number}: expected two tokens with one space between, not {line!r}")
        if unknown := [x for x in (*parts, "".join(parts)) if x not in ids]:
            raise ValueError(
                f"{path}:{number}: {unknown[0]!r} is not in vocab.json; both files must be of one tokenizer"
            )
        pair = (ids[parts[0]], ids[parts[1]])
        if pair in merges:
            raise ValueError(f"{path}:{number}: the merge {line!r} appears a second time; remove one of them")
        merges[pair] = None
    return tuple(merges)


def read_vocabulary(folder: Path | str) -> Vocabulary:
    """Read vocab.json and merges.txt of a folder.

    Raises ValueError, naming the file, when one is missing, malformed, or does not fit the other.
    """
    tokens = _read_tokens(Path(folder) / "vocab.json")
    merges = _read_merges(Path(folder) / "merges.txt", tokens)
    made = {tokens[left] + tokens[right] for left, right in merges}
    for token in tokens:
        # GPT-2's own vocabulary ends with <|endoftext|>, which no merge makes: text never yields it.
        if len(token) > 1 and token not in made and not (token.startswith(b"<") and token.endswith(b">")):
            raise ValueError(
                f"{Path(folder) / 'merges.txt'}: no merge makes {to_chars(token)!r} of vocab.json; "
                "the file is cut short or belongs to another vocabulary, copy both files again"
            )
    return Vocabulary(tokens=tokens, merges=merges)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(path)


def write_vocabulary(folder: Path | str, vocabulary: Vocabulary) -> None:
    """Write vocab.json and merges.txt into a folder, which is made when missing."""
    names = [to_chars(token) for token in vocabulary.tokens]
    merges = [f"{names[left]} {names[right]}\n" for left, right in vocabulary.merges]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {name: i for i, name in enumerate(names)}
    write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False) + "\n")
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(merges))
