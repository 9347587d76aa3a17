"""Cutting text into words: the regular expression of GPT-2, within whose matches alone bytes are merged.

Source: Radford et al. 2019, the pattern of GPT-2's released encoder.  Here its alternatives are reordered so
that the most frequent comes first (those moved can't match at the same place, so the matches are the same),
and pure ASCII takes an equivalent pattern of the standard library, which is twice as fast.

Ids must not change when a library learns a newer Unicode: letters and numbers are those of Unicode 16, as in
the ``tokenizers`` and ``tiktoken`` libraries.  What later versions added counts as neither.
"""

from __future__ import annotations

import re

import regex

# Letters and numbers that the pinned `regex` knows and Unicode 16 does not; a newer `regex` may need more.
_AFTER_UNICODE_16 = """
    0558 058B-058C 088F 0C5C 0CDC 208F 209D-209F A7CE-A7CF A7D2 A7D4 A7DD A7E2 A7F1 AB6C-AB6D 107BB-107BF
    10940-10959 10EC5-10EC7 10ED9-10EEE 11B0A 11DB0-11DDB 11DE0-11DE9 11DF1 1246F 12475-1247F 12550-12686
    16EA0-16EB8 16EBB-16ED3 16FF2-16FF6 187F8-187FF 18CD6-18CDA 18D09-18D20 18D80-18DF2 18E00-19191
    191A0-191D2 1B123-1B128 1B168 1D6A6 1DF1F-1DF24 1DF2B-1DF81 1DF90-1DF96 1DFCD-1DFFF 1E6C0-1E6DE
    1E6E0-1E6E2 1E6E4-1E6E5 1E6E7-1E6ED 1E6F0-1E6F4 1E6FE-1E6FF 2B73A-2B73F 2B81E 2CEA2-2CEAD 323B0-33479
    3D000-3FC3F
"""


def _pattern(letter: str, number: str, space: str) -> str:
    """GPT-2's pattern over three character classes, each given without its brackets."""
    return (
        rf" ?[{letter}]+|'(?:[stmd]|re|ve|ll)| ?[{number}]+| ?[^{space}{letter}{number}]+"
        rf"|[{space}]+(?![^{space}])|[{space}]+"
    )


def _newer() -> str:
    """The inside of a character class with everything in the table above."""
    ends = [item.partition("-") for item in _AFTER_UNICODE_16.split()]
    return "".join(rf"\U{int(a, 16):08X}-\U{int(b or a, 16):08X}" for a, _, b in ends)


_ASCII = re.compile(_pattern("A-Za-z", "0-9", r"\t-\r "))
_UNICODE = regex.compile(_pattern(r"\p{L}", r"\p{N}", r"\s"))
_UNICODE_16 = regex.compile(
    rf"(?V1) ?[\p{{L}}--[{_newer()}]]+|'(?:[stmd]|re|ve|ll)| ?[\p{{N}}--[{_newer()}]]+"
    rf"| ?[[^\s\p{{L}}\p{{N}}]||[{_newer()}]]+|\s+(?!\S)|\s+"
)

# Runs of code points without an entry in the table: Latin, Cyrillic, typographic signs, CJK, Hangul and emoji
# need no subtraction, which makes matching three times slower.
_MAY_BE_NEWER = re.compile("[^\0-\u0557\u0cdd-\u208e\u20a0-\ua7cd\uab6e-\U000107ba\U0001e700-\U0002b739]")


def split_words(text: str) -> list[str]:
    """Cut text into words whose concatenation is the text."""
    if text.isascii():
        return _ASCII.findall(text)
    return (_UNICODE_16 if _MAY_BE_NEWER.search(text) else _UNICODE).findall(text)
