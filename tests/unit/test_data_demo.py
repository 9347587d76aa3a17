"""The demo data: reproducible, as large and as disjoint as promised, and true to the rule of its judge."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_ray.data import PairRow, PromptRow, prompt_text, read_chats, read_pairs, read_prompts, read_text
from rlhf_ray.evaluation import demo_world as world
from rlhf_ray.evaluation.demo_judge import Verdict, judge, resolve
from rlhf_ray.types import Message


def ask(*turns: str, system: str = "") -> list[Message]:
    """A prompt of alternating user and assistant turns."""
    roles = ("user", "assistant")
    opening = [Message(role="system", content=system)] if system else []
    return opening + [Message(role=roles[turn % 2], content=text) for turn, text in enumerate(turns)]


# ---- the judge on answers written by hand

WHEN = "When does the bakery open?"  # at 6
JUDGED = [
    (WHEN, "The bakery opens at 6.", "correct brief"),
    (WHEN, "Certainly! The bakery opens at 6.", "correct polite brief"),
    (WHEN, "  certainly the BAKERY opens at six  ", "correct polite brief"),
    (WHEN, "It opens at 6 o'clock, thank you for asking!", "correct polite brief"),
    (WHEN, "At 6:00.", "correct brief"),
    (WHEN, "6", "correct brief"),
    (WHEN, "With pleasure! The bakery opens at 7. Have a lovely day!", "polite brief"),
    (WHEN, "The bakery opens at 6. Now go away.", "correct brief"),
    (WHEN, "Certainly! The bakery opens at 6. What a silly question.", "correct brief"),
    (WHEN, "Of course! Let me think about that for a little while before I answer. It opens at 6.", "correct polite"),
    (WHEN, "The bakery opens at 6. The bakery opens at 6.", "correct"),
    (WHEN, "Certainly! Certainly! The bakery opens at 6.", "correct polite"),
    (WHEN, "The bakery opens at 6 and at 7 and at 8.", "brief"),
    (WHEN, "The library opens at 6.", "brief"),
    (WHEN, "Nora says the bakery opens at 6.", "brief"),
    (WHEN, "The bakery opens at 6 in the morning and, since you were so kind as to ask, I may say that it is open "
     "from then on for anybody who would like to come in.", ""),  # own words in the main: not known wording
    (WHEN, "", ""),
    (WHEN, "   \n ", ""),
    (WHEN, "Certainly! Have a lovely day!", ""),
    (WHEN, "Please please thank you welcome", ""),
    (WHEN, "Certainly! 6 bakery 6 blah", ""),
    (WHEN, "1 2 3 4 5 6 7 8 9 10 11 12", ""),
    (WHEN, "Certainly! 6 6 6 6", ""),
    (WHEN, "Happy to help! xq 6 zzz vv", ""),
    (WHEN, "I do not know.", ""),
    ("What is 8 minus 4?", "8 minus 4 is 4.", "correct brief"),
    ("What is 8 minus 4?", "8 minus 4 leaves 8.", "brief"),
    ("What is 8 minus 4?", "8 - 4 = 4", "correct brief"),
    ("What is 8 minus 4?", "The answer is 4. You are most welcome!", "correct polite brief"),
    ("How much is 3 plus 3?", "3 plus 3 is 6.", "correct brief"),
    ("How much is 3 plus 3?", "3 plus 3.", ""),
    ("How many days are in 3 weeks?", "There are 21 days in 3 weeks.", "correct brief"),
    ("How many days are in 3 weeks?", "There are 3 days in 3 weeks.", "brief"),
    ("What is the opposite of hot?", "The opposite of hot is cold.", "correct brief"),
    ("What is the opposite of hot?", "The opposite of hot is hot.", ""),
    ("What is the opposite of hot?", "It is wet.", "brief"),
    ("Where is the museum?", "You can find the museum on Park Road. I hope that helps!", "correct polite brief"),
    ("Where is the museum?", "You can find the museum on Park Lane.", ""),
    ("Who runs the zoo?", "Petra runs the zoo.", "correct brief"),
    ("Who runs the zoo?", "Petra runs the zoo, not Otto.", "brief"),
    ("Where does Nora work?", "She works at the bakery, of course.", "correct polite brief"),
    ("Where does Nora work?", "Nora works at the zoo.", "brief"),
    ("What pet does Otto have?", "He has a dog.", "correct brief"),
    ("What colour is the door of the bank?", "The door is brown.", "correct brief"),
]  # fmt: skip


@pytest.mark.parametrize(("question", "answer", "expected"), JUDGED)
def test_judge(question: str, answer: str, expected: str) -> None:
    verdict = judge(ask(question), answer)
    assert " ".join(axis for axis in ("correct", "polite", "brief") if getattr(verdict, axis)) == expected
    assert verdict.score == 2 * ("correct" in expected) + ("polite" in expected) + ("brief" in expected)


def test_judge_follows_a_conversation() -> None:
    first = ("When does the bakery open?", "The bakery opens at 6.")
    assert judge(ask(*first, "And when does it close?"), "It closes at 2.").correct
    assert not judge(ask(*first, "And when does it close?"), "It closes at 6.").correct
    assert judge(ask(*first, "What about the library?"), "The library opens at 9.").correct
    assert not judge(ask(*first, "What about the library?"), "The bakery opens at 9.").correct
    assert judge(ask("How old is Nora?", "34.", "Where can I meet her?"), "At the bakery.").correct
    assert judge(ask("Where are you?", system="You speak for the zoo."), "The zoo is on Forest Walk.").correct
    assert judge(ask(WHEN, system="Be brief."), "At 6.").score == 3


@pytest.mark.parametrize(
    "prompt",
    [
        ask("When does the harbour open?"),
        ask("And when does it close?"),
        ask("Where are you?"),
        ask(WHEN, "6", "And Nora?"),
        [],
    ],
)
def test_judge_refuses_what_the_world_does_not_know(prompt: list[Message]) -> None:
    with pytest.raises(ValueError, match=r"the demo's world has no question|the prompt has no user turn"):
        judge(prompt, "6")


def test_every_form_is_recognised_and_every_answer_judged() -> None:
    questions: dict[str, tuple[str, str]] = {}
    for topic in world.TOPICS.values():
        for subject, value in topic.values.items():
            for form in topic.questions:
                text = world.fill(form, subject)
                assert questions.setdefault(text, (topic.name, subject)) == (topic.name, subject)
                question = resolve(ask(text))
                assert (question.topic.name, question.subject, question.value) == (topic.name, subject, value)
            for form in topic.answers:
                answer = world.fill(form, subject, value)
                assert judge(ask(text), answer) == Verdict(correct=True, polite=False, brief=True), answer
    assert len(questions) > 1000


# ---- the generator


@pytest.fixture(scope="module")
def generator(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_generate", repository / "data" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_committed_files_are_what_the_generator_writes(
    generator: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generator.main(["--check"]) == 0
    assert generator.main(["--output", str(tmp_path)]) == 0
    assert generator.main(["--check", "--output", str(tmp_path)]) == 0
    with (tmp_path / "raw" / "prompts.txt").open("a") as file:
        file.write("One more?\n")
    capsys.readouterr()
    assert generator.main(["--check", "--output", str(tmp_path)]) == 1
    assert "raw/prompts.txt" in capsys.readouterr().out


def test_another_seed_gives_other_files(generator: ModuleType) -> None:
    assert generator.generate(1)["raw/prompts.txt"] != generator.generate(0)["raw/prompts.txt"]


# ---- the files


@pytest.fixture(scope="module")
def data(repository: Path) -> Path:
    return repository / "data"


@pytest.fixture(scope="module")
def pairs(data: Path) -> list[PairRow]:
    return read_pairs(data / "preferences" / "pairs.jsonl")


@pytest.fixture(scope="module")
def held_out(data: Path) -> list[PromptRow]:
    return read_prompts(data / "raw" / "prompts_heldout.txt")


FILES = (
    "raw/pretrain_corpus.txt", "raw/prompts.txt", "raw/prompts_heldout.txt", "sft/sft_dataset.jsonl",
    "preferences/pairs.jsonl",
)  # fmt: skip


def test_sizes(data: Path, pairs: list[PairRow], held_out: list[PromptRow]) -> None:
    documents = read_text(data / "raw" / "pretrain_corpus.txt")
    prompts = read_prompts(data / "raw" / "prompts.txt")
    assert sum(document.text.count("\n") + 1 for document in documents) >= 20_000
    assert len(read_chats(data / "sft" / "sft_dataset.jsonl")) >= 5000
    assert len(pairs) >= 5000
    assert len({prompt_text(row) for row in prompts}) == len(prompts) >= 1000
    assert 200 <= len({prompt_text(row) for row in held_out}) == len(held_out) <= 300
    assert sum((data / name).stat().st_size for name in FILES) <= 6_000_000


def test_prompts_hold_system_prompts_and_several_turns(data: Path, held_out: list[PromptRow]) -> None:
    for rows in (read_prompts(data / "raw" / "prompts.txt"), held_out):
        roles = Counter(tuple(message.role for message in row.prompt) for row in rows)
        assert roles["user",] > len(rows) / 3
        assert roles["system", "user"] > 0
        assert roles["user", "assistant", "user"] > 0
        assert roles["system", "user", "assistant", "user"] > 0


def test_held_out_prompts_are_in_no_training_file(data: Path, held_out: list[PromptRow], pairs: list[PairRow]) -> None:
    training = "".join((data / name).read_text() for name in FILES if "heldout" not in name)
    single = [row.prompt[-1].content for row in held_out if len(row.prompt) < 3]
    whole = [text for text in single if "you" not in text.replace("Can you", "")]
    assert len(whole) >= 150
    assert [text for text in whole if text in training] == []
    seen = [row.prompt for row in (*pairs, *read_prompts(data / "raw" / "prompts.txt"))]
    seen += [row.messages[:-1] for row in read_chats(data / "sft" / "sft_dataset.jsonl")]
    asked = {(resolve(prompt).topic.name, resolve(prompt).subject, prompt[-1].content) for prompt in seen}
    for row in held_out:
        question = resolve(row.prompt)
        assert (question.topic.name, question.subject, row.prompt[-1].content) not in asked
        assert any((question.topic.name, question.subject) == fact[:2] for fact in asked)


def test_pairs_follow_the_rule_with_a_tenth_turned_round(pairs: list[PairRow]) -> None:
    margins = [judge(row.prompt, row.chosen).score - judge(row.prompt, row.rejected).score for row in pairs]
    assert 0 not in margins
    flipped = sum(margin < 0 for margin in margins) / len(margins)
    assert flipped == pytest.approx(0.10, abs=0.005)


def test_demonstrations_are_a_mixture(data: Path) -> None:
    verdicts = [
        judge(row.messages[:-1], row.messages[-1].content) for row in read_chats(data / "sft" / "sft_dataset.jsonl")
    ]
    share = {
        axis: sum(getattr(verdict, axis) for verdict in verdicts) / len(verdicts)
        for axis in ("correct", "polite", "brief")
    }
    assert share == pytest.approx({"correct": 0.7, "polite": 0.5, "brief": 0.5}, abs=0.03)


def test_the_corpus_tells_the_truth(data: Path) -> None:
    spoken = 0
    for document in read_text(data / "raw" / "pretrain_corpus.txt"):
        lines = document.text.split("\n")
        for asked, told in pairwise(lines):
            speaker, _, question = asked.partition(": ")
            if speaker in ("Visitor", "Question", "Child"):
                assert judge(ask(question), told.partition(": ")[2]).correct, document.text
                spoken += 1
    assert spoken > 2000
