"""The demo's judge: is an answer correct, polite and brief, by rule from the world's tables.

Nothing is trained against it.  An answer scores 2 for being correct, 1 for being polite and 1 for being
brief; of two answers the one with the higher score wins.

- To count at all, an answer must name a value of the kind asked for, in wording that the world knows: a few
  words of one's own are fine, word salad is not.  Anything else scores 0.
- Correct: it names the right value, no other value of that kind, and no place or person not asked about.
- Polite: it has a courteous phrase and no rude one.
- Brief: at most 18 words, no filler, and nothing said twice.

Left out on purpose: understanding.  The judge knows this world and refuses questions from outside.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from rlhf_ray.evaluation import demo_world as world
from rlhf_ray.evaluation.demo_world import TOPICS, Topic, fill
from rlhf_ray.types import Message

MAX_BRIEF_WORDS = 18
MIN_KNOWN_WORDING = 0.6
CORRECT, POLITE, BRIEF = 2.0, 1.0, 1.0

COURTEOUS_WORDS = frozenset(("please", "thank", "thanks", "welcome", "glad", "pleasure", "kindly", "delighted"))
RUDE_WORDS = frozenset(("fool", "silly", "stupid", "idiot", "dumb", "blind", "shut"))
NUMERALS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_DIGITS = {word: str(n) for n, word in enumerate(NUMERALS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a prompt asks."""

    topic: Topic
    subject: str

    @property
    def value(self) -> str:
        """The right answer."""
        return self.topic.values[self.subject]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the rule says of one answer."""

    correct: bool
    polite: bool
    brief: bool

    @property
    def score(self) -> float:
        """2 for correct, 1 for polite, 1 for brief."""
        return CORRECT * self.correct + POLITE * self.polite + BRIEF * self.brief


def judge(prompt: Sequence[Message], response: str) -> Verdict:
    """Judge an answer to a prompt of the demo's world.

    Raises ValueError when the prompt asks nothing that the world knows.
    """
    question = resolve(prompt)
    text = _plain(response)
    core = _strip_remarks(text)
    named = _named_values(question, core)
    if not named or not _known_wording(core):
        return Verdict(correct=False, polite=False, brief=False)
    words = _words(text)
    rude = _has(text, (*world.RUDE_OPENINGS, *world.RUDE_CLOSINGS)) or RUDE_WORDS.intersection(words)
    courteous = _has(text, (*world.OPENINGS, *world.CLOSINGS)) or COURTEOUS_WORDS.intersection(words)
    strangers = (_mentions("place", core) | _mentions("person", core)) - {question.subject, question.value}
    return Verdict(
        correct=named == {question.value} and not strangers,
        polite=bool(courteous) and not rude,
        brief=len(words) <= MAX_BRIEF_WORDS and not _has(text, world.FILLERS) and not _repeats(text),
    )


# ---- the question


def resolve(prompt: Sequence[Message]) -> Question:
    """What the last turn of a prompt asks, given the turns before it.

    Raises ValueError when a user turn asks nothing that the world knows.
    """
    subject, question = None, None
    for message in prompt:
        if message.role == "system":
            subject = _speakers().get(_key(message.content))
        elif message.role == "user":
            question = _ask(_key(message.content), subject, question)
            if question is None:
                raise ValueError(f"the demo's world has no question {message.content!r}")
            subject = question.subject
    if question is None:
        raise ValueError("the prompt has no user turn")
    return question


def _ask(key: str, subject: str | None, before: Question | None) -> Question | None:
    """A whole question, one about the subject at hand, or the question before about another subject."""
    if key in _questions():
        return _questions()[key]
    if subject is not None:
        name = _follow_ups().get((key, subject))
        if name is not None:
            return Question(topic=TOPICS[name], subject=subject)
    other = _switches().get(key)
    if before is not None and other is not None and other in before.topic.values:
        return Question(topic=before.topic, subject=other)
    return None


def _key(text: str) -> str:
    return " ".join(_words(_plain(text)))


@cache
def _questions() -> dict[str, Question]:
    return {
        _key(fill(form, subject)): Question(topic=topic, subject=subject)
        for topic in TOPICS.values()
        for subject in topic.values
        for form in topic.questions
    }


@cache
def _follow_ups() -> dict[tuple[str, str], str]:
    """(Question without a subject, subject) -> topic."""
    return {
        (_key(fill(form, subject)), subject): topic.name
        for topic in TOPICS.values()
        for subject in topic.values
        for form in (*topic.follow_ups, *topic.own)
    }


@cache
def _switches() -> dict[str, str]:
    subjects = [subject for topic in TOPICS.values() for subject in topic.values]
    return {_key(fill(form, subject)): subject for subject in subjects for form in world.SWITCHES}


@cache
def _speakers() -> dict[str, str]:
    return {_key(fill(world.SPEAKER, place)): place for place in world.PLACES}


# ---- the answer


def _plain(text: str) -> str:
    """Lower case, numbers as digits, signs as words."""
    text = text.lower().replace("’", "'").replace("+", " plus ").replace("=", " is ").replace("−", " minus ")
    text = re.sub(r"(?<=\d)\s*-\s*(?=\d)", " minus ", text)
    text = re.sub(r"\b(\d+):00\b", r"\1", text)
    text = re.sub(r" +", " ", text)
    return re.sub(r"\b[a-z]+\b", lambda m: _DIGITS.get(m[0], m[0]), text)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text)


@cache
def _pattern(phrases: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the phrases, whatever the punctuation between and after their words."""
    either = "|".join(r"[^a-z0-9']+".join(_words(_plain(phrase))) for phrase in phrases)
    return re.compile(rf"\b(?:{either})\b")


def _has(text: str, phrases: tuple[str, ...]) -> bool:
    return _pattern(phrases).search(text) is not None


def _strip_remarks(text: str) -> str:
    """The answer without courtesies, rudeness and filler."""
    remarks = (
        *world.OPENINGS, *world.CLOSINGS, *world.RUDE_OPENINGS, *world.RUDE_CLOSINGS, *world.FILLERS,
    )  # fmt: skip
    return _pattern(remarks).sub(" . ", text)


@cache
def _vocabulary(kind: str) -> dict[str, str]:
    """Every value of a kind, as it looks in plain text -> as it is written in the tables."""
    values = {value for topic in TOPICS.values() if topic.kind == kind for value in topic.values.values()}
    return {value.lower(): value for value in values}


def _mentions(kind: str, text: str) -> set[str]:
    """The values of a kind that a text names."""
    if kind == "number":
        return {str(int(number)) for number in re.findall(r"\d+", text)}
    spellings = _vocabulary(kind)
    return {spellings[found] for found in _pattern_of_kind(kind).findall(text)}


@cache
def _pattern_of_kind(kind: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(sorted(_vocabulary(kind)))})\b")


def _named_values(question: Question, core: str) -> set[str]:
    """The values of the asked kind that an answer names, the question's own words aside."""
    if question.topic.kind == "number":
        core = re.sub(rf"\b{re.escape(question.subject.lower())}\b", " ", core)
    return _mentions(question.topic.kind, core) - {question.subject}


def _known_wording(core: str) -> bool:
    """Whether most neighbouring words of an answer are neighbours in the world's own sentences."""
    seen = [pair in _wording() for pair in _neighbours(core)]
    return bool(seen) and sum(seen) >= MIN_KNOWN_WORDING * len(seen)


def _neighbours(text: str) -> list[tuple[str, str]]:
    """Neighbouring words within clauses, with ends marked and every value replaced by its kind."""
    clauses = [_words(clause) for clause in re.split(r"[.!?,;:\n]", text)]
    return [
        pair
        for clause in clauses
        if clause
        for pair in pairwise(("^", *(_kinds().get(w, "<number>" if w.isdigit() else w) for w in clause), "$"))
    ]


@cache
def _kinds() -> dict[str, str]:
    kinds = {topic.kind for topic in TOPICS.values()} - {"number"}
    return {word: f"<{kind}>" for kind in kinds for value in _vocabulary(kind) for word in value.split()}


@cache
def _wording() -> frozenset[tuple[str, str]]:
    """Pairs of neighbouring words in every form of every topic, and in bare values."""
    sentences: list[str] = []
    for topic in TOPICS.values():
        for subject, value in topic.values.items():
            forms: Iterable[str] = (*topic.answers, *topic.statements, "{v}.")
            sentences += (_plain(fill(form, subject, value)) for form in forms)
    return frozenset(pair for sentence in sentences for pair in _neighbours(sentence))


def _repeats(text: str) -> bool:
    """Whether a sentence, or three words in a row, come twice, or one word three times in a row."""
    sentences = [" ".join(words) for part in re.split(r"[.!?\n]", text) if (words := _words(part))]
    words = _words(text)
    triples = list(zip(words, words[1:], words[2:], strict=False))
    stutter = any(a == b == c for a, b, c in triples)
    return stutter or len(set(sentences)) < len(sentences) or len(set(triples)) < len(triples)
