"""What a data file holds, and what in it would harm a training stage: facts of its rows, and complaints about them.

A complaint says what was found, in how many rows and where first.  One ``stops``: the stage that reads the file would
end with an error.  The others only harm what is learned.

Left out on purpose: the meaning of texts, and near duplicates; equal texts are found exactly.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from rlhf_ray.data.formats import parse
from rlhf_ray.data.readers import TABLES, numbered_rows
from rlhf_ray.data.records import Bad, is_text, records
from rlhf_ray.data.rows import ChatRow, PairRow, PromptRow, TextRow
from rlhf_ray.data.splits import before_last_reply, prompt_text
from rlhf_ray.tokenizer import Template, Tokenizer
from rlhf_ray.types import Message

HEAD = 20
"""Records by which a file's kind is told."""
FOREIGN = re.compile("[^\x00-\x7f]{2,}")
FAULTS = {
    "replacement characters": re.compile("\ufffd"),
    "control characters": re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]"),
    "remains of HTML": re.compile(r"<br ?/?>|</?(?:p|div|span|a)\b[^>]*>|&(?:amp|lt|gt|quot|nbsp|#\d+);"),
    "another template's marks": re.compile(
        r"<\|\w+\|>|\[/?INST\]|<</?SYS>>|</?s>|^### (?:Instruction|Response):", re.M
    ),
}
"""What shows in a text that went wrong on its way, beside text decoded as if it were cp1252."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruler:
    """How lengths are measured: in tokens of a template, or in characters where there is no tokenizer."""

    tokenizer: Tokenizer | None = None
    template: Template | None = None
    limit: int = 0
    """Tokens that a row may have before a stage cuts or drops it; 0: no limit."""

    @property
    def unit(self) -> str:
        """What a length counts."""
        return "characters" if self.tokenizer is None else "tokens"

    def prompt(self, messages: Sequence[Message]) -> int:
        """Length of all that comes before an answer."""
        if self.tokenizer is None or self.template is None:
            return sum(len(message.content) for message in messages)
        return len(self.template.prompt_ids(self.tokenizer, messages))

    def text(self, text: str) -> int:
        """Length of an answer or a document, its EOS included."""
        return len(text) if self.tokenizer is None else len(self.tokenizer.encode(text)) + 1


@dataclass(slots=True, kw_only=True)
class Facts:
    """What is known of a file's rows."""

    path: Path
    kind: str
    """text, chats, pairs or prompts."""
    rows: int = 0
    complete: bool = True
    """Whether all rows were looked at."""
    bad: list[str] = field(default_factory=list)
    """file:line: reason of every row that can't be used."""
    lengths: dict[str, list[int]] = field(default_factory=dict)
    """Of each part of the rows, by its name."""
    too_long: int = 0
    """Rows beyond the limit."""
    duplicates: int = 0
    """Rows equal to one before."""
    prompts: Counter[bytes] = field(default_factory=Counter)
    """How often each prompt occurs, by its digest."""
    equal: int = 0
    """Pairs whose two responses are the same."""
    longer_chosen: int = 0
    shorter_chosen: int = 0
    faults: dict[str, list[int]] = field(default_factory=dict)
    """Row numbers by what is wrong with their text."""

    @property
    def unlike(self) -> int:
        """Pairs whose responses are not of one length."""
        return self.longer_chosen + self.shorter_chosen

    @property
    def longer_share(self) -> float:
        """Share of those whose longer response is the chosen one; there must be one."""
        return self.longer_chosen / self.unlike


def kind_of(path: Path) -> str:
    """What a file's rows are, told by its first records, or for plain text by its name; ValueError when by nothing."""
    if is_text(path):
        return "prompts" if "prompt" in path.name.lower() else "text"
    reasons: dict[str, str] = {}
    for _, (_, record) in zip(range(HEAD), records(path), strict=False):
        if isinstance(record, Bad):
            reasons["unread"] = record.reason
            continue
        for kind, table in TABLES.items():
            try:
                parse(record, table)
                return kind
            except ValueError as error:
                reasons[kind] = str(error)
    told = sorted(reasons.values(), key=lambda reason: "expected {" in reason)  # of a kind whose keys are there first
    raise ValueError(": ".join([f"{path}: none of its first rows can be used", *told[:1]]))


def look_at(path: Path, kind: str, ruler: Ruler, *, most: int = 0, seconds: float = 0.0) -> Facts:
    """Read a file and gather the facts of its rows: of the first ``most``, or for so many ``seconds`` (0: all).

    Raises ValueError when the file can't be read.
    """
    facts = Facts(path=path, kind=kind)
    seen: set[bytes] = set()
    end = perf_counter() + seconds if seconds else float("inf")
    for number, row in numbered_rows(path, kind):
        if (most and facts.rows >= most) or perf_counter() > end:
            facts.complete = False
            break
        if isinstance(row, Bad):
            facts.bad.append(f"{path}:{number}: {row.reason}")
            continue
        facts.rows += 1
        _measure(facts, row, ruler)
        texts = parts(row)
        whole = _digest("\0".join(texts.values()))
        facts.duplicates += whole in seen
        seen.add(whole)
        if kind != "text":
            facts.prompts[_digest(prompt_text(row))] += 1
        for fault in {fault for text in texts.values() for fault in faults_of(text)}:
            facts.faults.setdefault(fault, []).append(number)
    return facts


def parts(row: Any) -> dict[str, str]:
    """The texts of a row by what they are."""
    if isinstance(row, TextRow):
        return {"text": row.text}
    messages = before_last_reply(row.messages) if isinstance(row, ChatRow) else row.prompt
    texts = {"prompt": "\n".join(message.content for message in messages)}
    if isinstance(row, ChatRow):
        texts["response"] = row.messages[len(messages)].content
    if isinstance(row, PairRow):
        texts |= {"chosen": row.chosen, "rejected": row.rejected}
    return texts


def _measure(facts: Facts, row: TextRow | ChatRow | PairRow | PromptRow, ruler: Ruler) -> None:
    texts = parts(row)
    lengths = {name: ruler.text(text) for name, text in texts.items() if name != "prompt"}
    answer = max(lengths.values(), default=0)
    if not isinstance(row, TextRow):
        messages = before_last_reply(row.messages) if isinstance(row, ChatRow) else row.prompt
        lengths = {"prompt": ruler.prompt(messages), **lengths}
        facts.too_long += 0 < ruler.limit < lengths["prompt"] + answer
    for name, length in lengths.items():
        facts.lengths.setdefault(name, []).append(length)
    if isinstance(row, PairRow):
        facts.equal += row.chosen == row.rejected
        facts.longer_chosen += lengths["chosen"] > lengths["rejected"]
        facts.shorter_chosen += lengths["chosen"] < lengths["rejected"]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def faults_of(text: str) -> Iterator[str]:
    """What went wrong with a text on its way here."""
    yield from (name for name, pattern in FAULTS.items() if pattern.search(text))
    if any(_is_mojibake(run) for run in FOREIGN.findall(text)):
        yield "text decoded as if it were cp1252"


def _is_mojibake(run: str) -> bool:
    """Whether letters are the bytes of UTF-8, each taken for a letter of its own: 'Ã©' for 'é'."""
    raw = bytearray()
    for letter in run:
        try:
            raw += letter.encode("cp1252")
        except UnicodeEncodeError:
            if ord(letter) > 0xFF:
                return False
            raw.append(ord(letter))
    try:
        return len(raw.decode()) < len(run)
    except UnicodeDecodeError:
        return False
