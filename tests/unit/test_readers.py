"""Every row format in every file format, bad rows with their place, and real corpora whole."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.data import ChatRow, PairRow, PromptRow, read_chats, read_pairs, read_prompts, read_text
from rlhf_ray.data.formats import CHATS, PAIRS, PROMPTS, parse
from rlhf_ray.types import Message

U, A, S = "user", "assistant", "system"


def turns(*pairs: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=content) for role, content in pairs)


def listed(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def write(folder: Path, name: str, rows: list[Any]) -> Path:
    """Write rows in the format that the name's suffix asks for."""
    path = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    plain = name.removesuffix(".gz")
    text = json.dumps(rows) if plain.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


CHAT_ROWS = [
    ({"prompt": "hi", "response": "ho"}, turns((U, "hi"), (A, "ho"))),
    ({"prompt": "hi", "completion": "ho"}, turns((U, "hi"), (A, "ho"))),
    ({"prompt": listed((U, "hi")), "completion": listed((A, "ho"))}, turns((U, "hi"), (A, "ho"))),
    ({"messages": listed((S, "s"), (U, "hi"), (A, "ho"))}, turns((S, "s"), (U, "hi"), (A, "ho"))),
    (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        turns((U, "hi"), (A, "ho")),
    ),
    ({"instruction": "add", "input": "1 2", "output": "3"}, turns((U, "add\n1 2"), (A, "3"))),
    ({"instruction": "add", "input": "", "output": "3"}, turns((U, "add"), (A, "3"))),
    ({"instruction": "add", "output": "3", "system": "s"}, turns((S, "s"), (U, "add"), (A, "3"))),
    ({"prompt": "hi", "response": "ho", "system": " "}, turns((U, "hi"), (A, "ho"))),
]


@pytest.mark.parametrize(("record", "expected"), CHAT_ROWS)
def test_chat_formats(record: dict[str, Any], expected: tuple[Message, ...]) -> None:
    assert parse(record, CHATS) == ChatRow(messages=expected)


PAIR = PairRow(prompt=turns((U, "hi")), chosen="good", rejected="bad")
PAIR_ROWS = [
    {"prompt": "hi", "chosen": "good", "rejected": "bad"},
    {"prompt": listed((U, "hi")), "chosen": "good", "rejected": "bad"},
    {"prompt": listed((U, "hi")), "chosen": listed((A, "good")), "rejected": listed((A, "bad"))},
    {"prompt": "hi", "chosen": listed((U, "hi"), (A, "good")), "rejected": listed((U, "hi "), (A, "bad"))},
    {"chosen": listed((U, "hi"), (A, "good")), "rejected": listed((U, "hi"), (A, "bad"))},
    {"instruction": "hi", "input": "", "chosen": "good", "rejected": "bad"},
    {"chosen": "\n\nHuman: hi\n\nAssistant: good", "rejected": "\n\nHuman: hi\n\nAssistant: bad"},
    {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": "good", "rejected": "bad"},
]


@pytest.mark.parametrize("record", PAIR_ROWS)
def test_pair_formats(record: dict[str, Any]) -> None:
    assert parse(record, PAIRS) == PAIR


def test_pair_extras() -> None:
    row = parse({**PAIR_ROWS[0], "margin": 2, "system": "s", "source": "x"}, PAIRS)
    assert row == PairRow(
        prompt=turns((S, "s"), (U, "hi")), chosen="good", rejected="bad", margin=2.0, fields={"source": "x"}
    )
    with_system = [(S, "s"), (U, "hi")]
    row = parse(
        {
            "prompt": "hi",
            "chosen": listed(*with_system, (A, "good")),
            "rejected": listed(*with_system, (A, "bad")),
        },
        PAIRS,
    )
    assert row.prompt == turns(*with_system)


def test_hh_transcript_of_several_turns() -> None:
    before = "\n\nHuman: one\n\nwith a paragraph\n\nAssistant: two\n\nHuman: three"
    row = parse({"chosen": f"{before}\n\nAssistant: good", "rejected": f"{before}\n\nAssistant: bad"}, PAIRS)
    assert row.prompt == turns((U, "one\n\nwith a paragraph"), (A, "two"), (U, "three"))
    assert (row.chosen, row.rejected) == ("good", "bad")


PROMPT_ROWS = [
    ({"prompt": "hi", "target": 7}, PromptRow(prompt=turns((U, "hi")), fields={"target": 7})),
    ({"prompt": listed((S, "s"), (U, "hi"))}, PromptRow(prompt=turns((S, "s"), (U, "hi")))),
    ({"messages": listed((U, "a"), (A, "b"), (U, "c"))}, PromptRow(prompt=turns((U, "a"), (A, "b"), (U, "c")))),
    (
        {"instruction": "add", "input": "1 2", "output": "3"},
        PromptRow(prompt=turns((U, "add\n1 2")), fields={"output": "3"}),
    ),
    ({"prompt": "hi", "system": "s"}, PromptRow(prompt=turns((S, "s"), (U, "hi")))),
]


@pytest.mark.parametrize(("record", "expected"), PROMPT_ROWS)
def test_prompt_formats(record: dict[str, Any], expected: PromptRow) -> None:
    assert parse(record, PROMPTS) == expected


BAD_ROWS = [
    (CHATS, {"question": "a"}, r"row has \{question\}, expected \{messages\} or"),
    (CHATS, {"prompt": "a", "response": None}, r"row has \{prompt\}"),
    (CHATS, ["a"], "row is list, expected an object"),
    (CHATS, {"prompt": "a", "response": 3}, "response is neither|response is int"),
    (CHATS, {"prompt": "a", "response": " "}, "response is empty"),
    (CHATS, {"prompt": "", "response": "b"}, "prompt is empty"),
    (CHATS, {"prompt": "a\ud800", "response": "b"}, "prompt holds half of a surrogate pair at character 1"),
    (CHATS, {"prompt": "a", "response": "b", "weight": -1}, "weight is -1, expected a finite number of at least 0"),
    (CHATS, {"prompt": "a", "response": "b", "weight": True}, "weight is True"),
    (CHATS, {"prompt": "a", "response": "b", "weight": float("nan")}, "weight is nan"),
    (CHATS, {"messages": []}, "messages is empty"),
    (CHATS, {"messages": listed((U, "a"))}, "no assistant turn to learn from"),
    (CHATS, {"messages": [{"role": "tool", "content": "a"}]}, "messages turn 1 has role 'tool'; allowed are"),
    (CHATS, {"messages": [{"role": U}]}, "messages turn 1's content is NoneType"),
    (CHATS, {"messages": ["a"]}, "messages turn 1 is str"),
    (CHATS, {"messages": listed((U, "a"), (S, "b"))}, "a system turn may only come first"),
    (CHATS, {"messages": listed((S, "a"), (U, "b"), (A, "c")), "system": "s"}, "system is given twice"),
    (CHATS, {"conversations": [{"from": "bot", "value": "a"}]}, "conversations turn 1 has from 'bot'"),
    (CHATS, {"prompt": listed((U, "a"), (A, "b")), "response": "c"}, "prompt ends with a assistant turn"),
    (CHATS, {"instruction": "a", "input": 3, "output": "c"}, "input is int"),
    (PAIRS, {"prompt": "a", "chosen": "b"}, r"row has \{prompt, chosen\}"),
    (PAIRS, {"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
    (PAIRS, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "margin is 'big'"),
    (PAIRS, {"chosen": "plain", "rejected": "text"}, "chosen does not begin with 'Human:'"),
    (PAIRS, {"chosen": listed((A, "b")), "rejected": listed((A, "c"))}, "no user turn before the responses"),
    (PAIRS, {"prompt": "a", "chosen": listed((U, "a")), "rejected": "c"}, "chosen ends with a user turn"),
    (PAIRS, {"prompt": "a", "chosen": listed((U, "x"), (A, "b")), "rejected": "c"}, "differs from the row's prompt"),
    (
        PAIRS,
        {"chosen": listed((U, "a"), (A, "b")), "rejected": listed((U, "z"), (A, "c"))},
        "chosen and rejected differ before the last turn",
    ),
    (PROMPTS, {"messages": listed((U, "a"), (A, "b"))}, "the prompt ends with a assistant turn"),
]


@pytest.mark.parametrize(("table", "record", "reason"), BAD_ROWS)
def test_bad_rows_say_why(table: Any, record: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(record, table)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet", "A.JSONL", "a.ndjson"])
def test_file_formats_agree(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": f"question {i}\u2028é", "response": f"answer {i}"} for i in range(5)]
    chats = read_chats(write(tmp_path, name, rows))
    assert [chat.messages[0].content for chat in chats] == [row["prompt"] for row in rows]
    assert chats[4].messages == turns((U, "question 4\u2028é"), (A, "answer 4"))


def test_parquet_of_mixed_rows_and_messages(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b"}, {"messages": listed((U, "c"), (A, "d"))}]
    path = tmp_path / "mixed.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(
        [("prompt", pyarrow.string()), ("response", pyarrow.string()),
         ("messages", pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])))]
    )), path)  # fmt: skip
    assert [row.messages for row in read_chats(path)] == [turns((U, "a"), (A, "b")), turns((U, "c"), (A, "d"))]


def test_bad_rows_are_counted_up_to_a_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": 2}\n{oops\n{"text": "caf\xe9"}\n{"text": "two", "weight": 3}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: text is int, expected text \(1 bad rows, max_bad_rows is 0"):
        read_text(path)
    with pytest.raises(ValueError, match=r"rows\.jsonl:5: not UTF-8"):
        read_text(path, max_bad_rows=2)
    caplog.clear()
    rows = read_text(path, max_bad_rows=3)
    assert [(row.text, row.weight) for row in rows] == [("one", 1.0), ("two", 3.0)]
    assert [record.message.split(" (skipped")[0] for record in caplog.records] == [
        f"{path}:3: text is int, expected text",
        f"{path}:4: not JSON (Expecting property name enclosed in double quotes at column 2)",
        f"{path}:5: not UTF-8 (invalid continuation byte at byte 13)",
    ]


def test_row_number_of_a_json_list(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.json", [{"text": "one"}, {"text": ""}])
    with pytest.raises(ValueError, match=r"rows\.json:2: text is empty"):
        read_text(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, content, reason in [
        ("empty.jsonl", b"", "no rows: the file is empty"),
        ("blank.txt", b"\n \n", "no rows"),
        ("empty.json", b"[]", "no rows"),
        ("cut.json", b'[{"text": "a"},', r"cut\.json:1: not a JSON list"),
        ("a.csv", b"text\na", "unknown suffix; known are"),
        ("plain.jsonl.gz", b'{"text": "a"}', "can't be read"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999)[:60], "can't be read"),
        ("bad.parquet", b"PAR1", "not a readable Parquet file"),
        ("list.json", b"[" * 100_000, "nested too deep"),
        ("lines.jsonl", b'{"text":' * 100_000, "nested too deep"),
    ]:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason) as caught:
            read_text(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no such file"):
        read_pairs(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="no such file"):
        read_text(tmp_path)


def test_a_blank_line_ends_a_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n  \nthree\n\n\xff\nfour")
    with pytest.raises(ValueError, match=r"book\.txt:7: not UTF-8"):
        read_text(path)
    assert [row.text for row in read_text(path, max_bad_rows=1)] == ["one\ntwo", "three", "four"]


def test_prompt_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    messages = {"messages": listed((S, "s"), (U, "b")), "id": 5}
    path.write_text(f"a question\n\n{json.dumps(messages)}\nanother\n")
    assert read_prompts(path) == [
        PromptRow(prompt=turns((U, "a question"))),
        PromptRow(prompt=turns((S, "s"), (U, "b")), fields={"id": 5}),
        PromptRow(prompt=turns((U, "another"))),
    ]
    path.write_text('fine\n{"messages": }\n')
    with pytest.raises(ValueError, match=r"prompts\.txt:2: not JSON"):
        read_prompts(path)


def test_max_bad_rows_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_bad_rows is -1"):
        read_text(write(tmp_path, "a.jsonl", [{"text": "a"}]), max_bad_rows=-1)


said = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
conversation = st.lists(st.tuples(said, said), min_size=1, max_size=4).map(
    lambda rounds: [(role, text) for pair in rounds for role, text in zip((U, A), pair, strict=True)]
)


@settings(max_examples=40, deadline=None)
@given(st.lists(conversation, min_size=1, max_size=5), st.sampled_from(["a.jsonl", "a.json.gz", "a.parquet"]))
def test_conversations_round_trip(tmp_path_factory: pytest.TempPathFactory, chats: list[Any], name: str) -> None:
    path = write(tmp_path_factory.mktemp("rows"), name, [{"messages": listed(*chat)} for chat in chats])
    assert read_chats(path) == [ChatRow(messages=turns(*chat)) for chat in chats]


hh_said = said.map(lambda text: text.replace("\n", " ").strip())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(hh_said, hh_said), max_size=3), hh_said, hh_said, hh_said)
def test_transcripts_round_trip(rounds: list[tuple[str, str]], last: str, chosen: str, rejected: str) -> None:
    flat = [(role, text) for pair in rounds for role, text in zip((U, A), pair, strict=True)] + [(U, last)]
    names = {U: "Human", A: "Assistant"}
    before = "".join(f"\n\n{names[role]}: {text}" for role, text in flat)
    record = {"chosen": f"{before}\n\nAssistant: {chosen}", "rejected": f"{before}\n\nAssistant: {rejected}"}
    assert parse(record, PAIRS) == PairRow(prompt=turns(*flat), chosen=chosen, rejected=rejected)


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["prompt", "response", "messages", "conversations", "chosen", "rejected", "role", "content"])
    | st.text(), x)), st.sampled_from([CHATS, PAIRS, PROMPTS]))  # fmt: skip
def test_any_json_is_a_row_or_a_value_error(record: Any, table: Any) -> None:
    with suppress(ValueError):
        assert isinstance(parse(record, table), ChatRow | PairRow | PromptRow)


@pytest.mark.parametrize(
    ("reader", "name", "count"),
    [
        (read_text, "pretrain/imdb_train.jsonl.gz", 25_000),
        (read_text, "pretrain/classic_books_c.jsonl.gz", 83),
        (read_text, "eval/lambada_test.jsonl", 5153),
        (read_chats, "sft/sgd_train_messages.jsonl.gz", 12_174),
        (read_chats, "sft/sgd_dev_messages.jsonl.gz", 2098),
        (read_chats, "sft/alpaca_en_demo_1000.json", 999),
        (read_chats, "sft/rasbt_instruction_1100.json", 1100),
        (read_pairs, "preferences/rasbt_pref_1100.json", 1100),
        (read_pairs, "preferences/ddpp_dev_pairs.jsonl", 5140),
        (read_pairs, "preferences/oasst_en_100_pairs.jsonl", 429),
        (read_prompts, "preferences/rasbt_pref_1100.json", 1100),
    ],
)
def test_real_files_read_whole(test_data: Path, reader: Any, name: str, count: int) -> None:
    assert len(reader(test_data / name)) == count
