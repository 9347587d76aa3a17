"""The invented town of Brindle: its places and people, and all there is to know of them.

Values stand in the order of the subjects.  Skills that need no town, and how people talk: ``demo_world``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TOWN = "Brindle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """One attribute with its values and the ways to speak of it."""

    name: str
    kind: str
    """What a value is: number, place, person, street, colour, pet, drink, instrument or word."""
    values: Mapping[str, str]
    """Subject -> value."""
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    statements: tuple[str, ...] = ()
    """Further true sentences, for the pre-training text."""
    follow_ups: tuple[str, ...] = ()
    """Questions about the subject of the turn before."""
    own: tuple[str, ...] = ()
    """Questions to a place that speaks for itself."""


PLACES = (
    "bakery", "library", "museum", "market", "theatre", "bank", "garden",
    "chapel", "inn", "pharmacy", "bookshop", "cinema", "zoo", "tower",
)  # fmt: skip
PEOPLE = {
    "Nora": "she", "Otto": "he", "Ivy": "she", "Hugo": "he", "Mabel": "she", "Felix": "he", "Clara": "she",
    "Jonas": "he", "Greta": "she", "Silas": "he", "Edith": "she", "Bruno": "he", "Petra": "she",
    "Oscar": "he",
}  # fmt: skip


def _by(subjects: tuple[str, ...], values: str) -> dict[str, str]:
    """Pair subjects with comma-separated values."""
    return dict(zip(subjects, values.split(", "), strict=True))


PLACE_TOPICS = (
    Topic(
        name="opens",
        kind="number",
        values=_by(PLACES, "6, 9, 10, 7, 11, 9, 8, 7, 6, 8, 10, 11, 9, 8"),
        questions=(
            "When does {x} open?",
            "What time does {x} open?",
            "Can you tell me when {x} opens?",
            "How early can I visit {x}?",
        ),
        answers=("{x} opens at {v}.", "{it} opens at {v}.", "You can visit {x} from {v}."),
        statements=("{x} opens at {v} in the morning.", "Every day {x} opens its doors at {v}."),
        follow_ups=("And when does {it} open?", "What time does {it} open?"),
        own=("When do you open?", "What time do you open?"),
    ),
    Topic(
        name="closes",
        kind="number",
        values=_by(PLACES, "2, 5, 4, 1, 12, 3, 6, 5, 11, 6, 4, 12, 5, 3"),
        questions=(
            "When does {x} close?",
            "What time does {x} close?",
            "Can you tell me when {x} closes?",
            "How late can I visit {x}?",
        ),
        answers=("{x} closes at {v}.", "{it} closes at {v}.", "You can visit {x} until {v}."),
        statements=("{x} closes at {v} every day.", "The doors of {x} close at {v}."),
        follow_ups=("And when does {it} close?", "What time does {it} close?"),
        own=("When do you close?", "What time do you close?"),
    ),
    Topic(
        name="street",
        kind="street",
        values=_by(
            PLACES,
            "Mill Lane, King Street, Park Road, River Walk, Rose Street, Bridge Road, Hill Lane, "
            "Church Walk, Station Road, Oak Lane, Elm Street, Lake Road, Forest Walk, Castle Street",
        ),
        questions=(
            "Where is {x}?",
            "On which street is {x}?",
            "Can you tell me where {x} is?",
            "How do I find {x}?",
        ),
        answers=("{x} is on {v}.", "{it} is on {v}.", "You can find {x} on {v}."),
        statements=("{x} stands on {v}.", "If you walk along {v}, you see {x}."),
        follow_ups=("And where is {it}?", "On which street is {it}?"),
        own=("Where are you?", "On which street are you?"),
    ),
    Topic(
        name="price",
        kind="number",
        values=_by(PLACES, "2, 3, 8, 4, 12, 5, 6, 11, 9, 3, 2, 10, 7, 5"),
        questions=(
            "What does a tour of {x} cost?",
            "How much is a tour of {x}?",
            "How many coins is a tour of {x}?",
            "What do I pay for a tour of {x}?",
        ),
        answers=("A tour of {x} costs {v} coins.", "The tour costs {v} coins.", "You pay {v} coins."),
        statements=("The price of a tour of {x} is {v} coins.", "For {v} coins you get a tour of {x}."),
        follow_ups=("And what does a tour cost?", "How much is a tour there?"),
        own=("What does your tour cost?", "How much is your tour?"),
    ),
    Topic(
        name="walk",
        kind="number",
        values=_by(PLACES, "5, 12, 8, 3, 15, 6, 20, 10, 2, 7, 14, 9, 25, 18"),
        questions=(
            "How far is {x} from the station?",
            "How long is the walk from the station to {x}?",
            "How many minutes is {x} from the station?",
            "How long do I walk to {x}?",
        ),
        answers=(
            "{x} is {v} minutes from the station.",
            "The walk takes {v} minutes.",
            "It is a walk of {v} minutes.",
        ),
        statements=(
            "The walk from the station to {x} takes {v} minutes.",
            "After {v} minutes of walking from the station you are at {x}.",
        ),
        follow_ups=("And how far is {it} from the station?", "How long do I walk there?"),
        own=("How far are you from the station?", "How long do I walk to you?"),
    ),
    Topic(
        name="door",
        kind="colour",
        values=_by(
            PLACES,
            "red, blue, green, yellow, purple, brown, white, grey, orange, pink, black, silver, golden, blue",
        ),
        questions=(
            "What colour is the door of {x}?",
            "Which colour does the door of {x} have?",
            "Can you tell me the colour of the door of {x}?",
        ),
        answers=("The door of {x} is {v}.", "{x} has a door that is {v}.", "The door is {v}."),
        statements=("The {v} door belongs to {x}.", "Behind the {v} door you find {x}."),
        follow_ups=("And what colour is the door?", "Which colour does the door have?"),
        own=("What colour is your door?", "Which colour does your door have?"),
    ),
    Topic(
        name="keeper",
        kind="person",
        values=dict(zip(PLACES, PEOPLE, strict=True)),
        questions=(
            "Who runs {x}?",
            "Who is in charge of {x}?",
            "Who looks after {x}?",
            "Can you tell me who runs {x}?",
        ),
        answers=("{v} runs {x}.", "{x} is run by {v}.", "{v} is in charge of {x}."),
        statements=("{v} looks after {x} with great care.", "In the mornings {v} unlocks {x}."),
        follow_ups=("And who runs {it}?", "Who is in charge there?"),
        own=("Who runs your house?", "Who is in charge of you?"),
    ),
)

_NAMES = tuple(PEOPLE)
PEOPLE_TOPICS = (
    Topic(
        name="work",
        kind="place",
        values=dict(zip(_NAMES, PLACES, strict=True)),
        questions=("Where does {x} work?", "Where can I meet {x}?", "Which place does {x} run?"),
        answers=("{x} works at the {v}.", "{it} works at the {v}.", "You can meet {x} at the {v}."),
        statements=("{x} spends the day at the {v}.", "At the {v} you meet {x}."),
        follow_ups=("And where does {it} work?", "Where can I meet {it_}?"),
    ),
    Topic(
        name="age",
        kind="number",
        values=_by(_NAMES, "34, 61, 27, 45, 70, 52, 38, 23, 66, 49, 31, 57, 42, 29"),
        questions=("How old is {x}?", "What is the age of {x}?", "Can you tell me how old {x} is?"),
        answers=("{x} is {v} years old.", "{it} is {v} years old.", "The age of {x} is {v}."),
        statements=("This year {x} turned {v}.", "There were {v} candles on the cake of {x}."),
        follow_ups=("And how old is {it}?", "What is {its} age?"),
    ),
    Topic(
        name="pet",
        kind="pet",
        values=_by(
            _NAMES,
            "cat, dog, parrot, rabbit, goat, hamster, turtle, horse, ferret, goose, pony, duck, hen, mouse",
        ),
        questions=("What pet does {x} have?", "Which animal lives with {x}?", "What animal does {x} keep?"),
        answers=("{x} has a {v}.", "{it} has a {v}.", "The pet of {x} is a {v}."),
        statements=("{x} takes good care of a {v}.", "A {v} lives with {x}."),
        follow_ups=("And what pet does {it} have?", "Which animal does {it} keep?"),
    ),
    Topic(
        name="drink",
        kind="drink",
        values=_by(
            _NAMES,
            "tea, coffee, cocoa, milk, cider, lemonade, juice, tea, coffee, cocoa, milk, cider, lemonade, juice",
        ),
        questions=(
            "What does {x} like to drink?",
            "What is the favourite drink of {x}?",
            "Which drink does {x} prefer?",
        ),
        answers=("{x} likes to drink {v}.", "{it} likes to drink {v}.", "The favourite drink of {x} is {v}."),
        statements=("In the evening {x} has a cup of {v}.", "{x} always asks for {v}."),
        follow_ups=("And what does {it} like to drink?", "Which drink does {it} prefer?"),
    ),
    Topic(
        name="instrument",
        kind="instrument",
        values=_by(
            _NAMES,
            "flute, violin, piano, drum, harp, trumpet, guitar, cello, flute, violin, piano, drum, harp, trumpet",
        ),
        questions=(
            "What instrument does {x} play?",
            "Which instrument can {x} play?",
            "What does {x} play in the town band?",
        ),
        answers=("{x} plays the {v}.", "{it} plays the {v}.", "The instrument of {x} is the {v}."),
        statements=("On Sundays {x} plays the {v} in the park.", "{x} learned the {v} as a child."),
        follow_ups=("And what instrument does {it} play?", "Which instrument can {it} play?"),
    ),
)
