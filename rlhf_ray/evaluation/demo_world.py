"""The demo's world as plain data: the town of Brindle, sums, units and opposites, and manners of speech.

A topic is one thing that can be asked of many subjects ("when does the bakery open?"): its values, and the
forms of its questions, answers and statements.  In a form {x} is the subject, {it} its pronoun and {v} the
value.  The generator of the demo data and the rule judge read these same tables.
"""

from __future__ import annotations

from rlhf_ray.evaluation.demo_town import PEOPLE, PEOPLE_TOPICS, PLACE_TOPICS, PLACES, TOWN, Topic

_OPPOSITES = """hot cold, big small, fast slow, happy sad, full empty, wet dry, loud quiet, hard soft,
high low, rich poor, strong weak, up down, left right, sweet sour, thick thin, clean dirty, brave timid,
sharp blunt, near far, wide narrow, young old, heavy light, win lose, push pull"""
_BOTH_WAYS = [pair.split() for pair in _OPPOSITES.replace("\n", " ").split(", ")]


def _units(large: str, small: str, factor: int, counts: range) -> Topic:
    """How many small units are in a few large ones."""
    return Topic(
        name=f"{large} to {small}",
        kind="number",
        values={f"{n} {large}": str(n * factor) for n in counts},
        questions=(
            f"How many {small} are in {{x}}?",
            f"How many {small} make {{x}}?",
            f"Convert {{x}} to {small}.",
        ),
        answers=(
            f"There are {{v}} {small} in {{x}}.",
            f"{{x}} make {{v}} {small}.",
            f"That is {{v}} {small}.",
        ),
        statements=(f"{{x}} are {{v}} {small}.",),
    )


SKILL_TOPICS = (
    Topic(
        name="opposite",
        kind="word",
        values={a: b for pair in _BOTH_WAYS for a, b in (pair, pair[::-1])},
        questions=(
            "What is the opposite of {x}?",
            "Which word means the opposite of {x}?",
            "Give me the opposite of {x}.",
        ),
        answers=("The opposite of {x} is {v}.", "It is {v}.", "The word is {v}."),
        statements=("If something is not {x}, it may be {v}.", "{x} and {v} are opposites."),
    ),
    Topic(
        name="sum",
        kind="number",
        values={f"{a} plus {b}": str(a + b) for a in range(1, 10) for b in range(1, 10)},
        questions=("What is {x}?", "How much is {x}?", "Can you work out {x}?"),
        answers=("{x} is {v}.", "{x} makes {v}.", "The answer is {v}."),
        statements=("If you add it up, {x} is {v}.",),
    ),
    Topic(
        name="difference",
        kind="number",
        values={f"{a} minus {b}": str(a - b) for a in range(2, 11) for b in range(1, a)},
        questions=("What is {x}?", "How much is {x}?", "Can you work out {x}?"),
        answers=("{x} is {v}.", "{x} leaves {v}.", "The answer is {v}."),
        statements=("If you take it away, {x} is {v}.",),
    ),
    _units("weeks", "days", 7, range(2, 7)),
    _units("hours", "minutes", 60, range(2, 6)),
    _units("dozens", "eggs", 12, range(2, 7)),
    _units("metres", "centimetres", 100, range(2, 8)),
    _units("years", "months", 12, range(2, 7)),
    _units("yards", "feet", 3, range(2, 10)),
)
TOPICS = {topic.name: topic for topic in (*PLACE_TOPICS, *PEOPLE_TOPICS, *SKILL_TOPICS)}

SWITCHES = ("And {x}?", "What about {x}?")
"""Follow-ups that ask the same of another subject."""
SPEAKER = "You speak for {x}."
"""System prompt that makes "you" a place."""
GUIDES = (f"You are a guide to {TOWN}.", f"You help the visitors of {TOWN}.")
"""System prompts that change nothing."""

OPENINGS = ("Certainly!", "Of course!", "With pleasure!", "Happy to help!", "Thank you for asking!")
CLOSINGS = ("Have a lovely day!", "You are most welcome!", "I hope that helps!", "Please ask again any time!")
RUDE_OPENINGS = ("Not again.", "Are you blind?", "What a silly question.", "Read the sign, fool.")
RUDE_CLOSINGS = ("Now go away.", "Stop wasting my time.", "Everybody knows that.", "Use your head next time.")
FILLERS = (
    "Well, there is so much that somebody could say about this.",
    "Let me think about that for a little while before I answer.",
    "People have talked about this in the town for many years.",
    "As I always say, every question has a story behind it.",
    "I could go on and on, since every thing leads to another.",
    "But then again, that is only my way of looking at things.",
)

_PRONOUNS = {"she": {"it_": "her", "its": "her"}, "he": {"it_": "him", "its": "his"}}


def display(subject: str) -> str:
    """A subject as it stands in a sentence: places take an article."""
    return f"the {subject}" if subject in PLACES else subject


def fill(form: str, subject: str, value: str = "") -> str:
    """A form as a sentence about the subject."""
    it = PEOPLE.get(subject, "it")
    text = form.format(x=display(subject), v=value, it=it, **_PRONOUNS.get(it, {}))
    return text[0].upper() + text[1:]
