"""launch/tokenizer.py as a user runs it: from any directory, through pipes, with mistakes."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.tokenizer import Tokenizer, train_bpe

LINES = ["the cat sat on the mat", "the dog's dinner, naïve 你好", "a cat and a dog sat"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(LINES * 2, 270).save(folder)
    return folder


def run(repository: Path, cwd: Path, *args: str | Path, data: bytes = b"") -> tuple[int, bytes, str]:
    """Exit code, standard output and standard error of the script, started elsewhere."""
    command = [sys.executable, str(repository / "launch/tokenizer.py"), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, input=data, capture_output=True, check=False)
    return done.returncode, done.stdout, done.stderr.decode()


def test_train_reads_text_and_rows_alike(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LINES[0] + "\n" + LINES[1] + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps({"text": line, "id": 1}) for line in LINES) + "\n\n")
    code, out, err = run(
        repository,
        tmp_path,
        "train",
        "--input",
        "a.txt",
        "b.jsonl.gz",
        "--vocab-size",
        "270",
        "--output",
        "out/tok",
    )
    assert (code, err) == (0, "")
    assert out.decode().splitlines()[-1] == "next: python launch/pretrain.py"
    assert "merges 14/14" in out.decode()
    expected = train_bpe([LINES[0] + "\n" + LINES[1] + "\n", *LINES], 270)
    assert Tokenizer.load(tmp_path / "out/tok").fingerprint == expected.fingerprint


def test_encode_and_decode_are_inverse_filters(repository: Path, trained: Path, tmp_path: Path) -> None:
    text = "the cat's <|eos|>\r\n\n naïve 😀 no newline at the end"
    code, out, err = run(repository, tmp_path, "encode", "--tokenizer", trained, data=text.encode())
    assert (code, err) == (0, "")
    assert json.loads(out) == Tokenizer.load(trained).encode(text)
    assert run(repository, tmp_path, "decode", "--tokenizer", trained, data=out) == (0, text.encode(), "")


def test_decode_can_keep_special_tokens(repository: Path, trained: Path, tmp_path: Path) -> None:
    ids = b"[271, 64, 272]"
    assert run(repository, tmp_path, "decode", "--tokenizer", trained, data=ids)[1] == b"a"
    kept = run(repository, tmp_path, "decode", "--tokenizer", trained, "--keep-special", data=ids)[1]
    assert kept == b"<|bos|>a<|eos|>"


BAD_TRAINING = {
    "missing file": (["--input", "none.txt"], "error: none.txt: no such file"),
    "empty": (["--input", "empty.txt"], "error: the text to train on is empty"),
    "too small": (
        ["--input", "bad.jsonl", "--vocab-size", "9"],
        "error: vocab_size is 9; it must be at least 256",
    ),
    "bad row": (["--input", "bad.jsonl"], "error: bad.jsonl:2: not valid JSON"),
    "no text": (
        ["--input", "keys.jsonl"],
        'error: keys.jsonl:1: a row must be an object with a string under "text"',
    ),
    "surrogate": (["--input", "half.jsonl"], "error: half.jsonl:1: the text holds a lone surrogate"),
    "latin-1": (["--input", "latin.txt"], "error: latin.txt: not UTF-8 text"),
    "not gzip": (["--input", "fake.txt.gz"], "error: fake.txt.gz: the .gz file is damaged"),
    "too large": (
        ["--input", "short.txt"],
        "error: vocab_size is 4096, but the text has repeated pairs for 257",
    ),
    "unknown flag": (["--inptu", "x"], "error: unknown flag --inptu; the nearest is --input"),
    "no input": ([], "error: the following arguments are required: --input"),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_mistakes_in_training_are_one_line_and_write_nothing(repository: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "keys.jsonl").write_text('{"prompt": "hi"}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d"}\n')
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "fake.txt.gz").write_text("plain")
    (tmp_path / "short.txt").write_text("abab")
    args, message = BAD_TRAINING[case]
    code, _, err = run(repository, tmp_path, "train", *args, "--output", "out")
    assert code == 2
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


BAD_STREAMS = {
    "latin-1": ("encode", b"\xff", "error: standard input is not UTF-8"),
    "not JSON": ("decode", b"[1, 2", "error: standard input is not JSON"),
    "not a list": ("decode", b'{"ids": []}', "error: standard input must be one JSON list of whole numbers"),
    "not numbers": ("decode", b"[1.5, true]", "error: standard input must be one JSON list of whole numbers"),
    "beyond": ("decode", b"[277]", "error: token id 277 is not in the vocabulary (0 to 276)"),
}


@pytest.mark.parametrize("case", BAD_STREAMS)
def test_mistakes_in_streams_are_one_line(repository: Path, trained: Path, tmp_path: Path, case: str) -> None:
    command, data, message = BAD_STREAMS[case]
    code, out, err = run(repository, tmp_path, command, "--tokenizer", trained, data=data)
    assert (code, out) == (2, b"")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_unknown_command_and_missing_tokenizer(repository: Path, tmp_path: Path) -> None:
    assert run(repository, tmp_path, "trian")[0] == 2
    code, _, err = run(repository, tmp_path, "encode", "--tokenizer", "nowhere", data=b"x")
    assert code == 2
    assert err.startswith("error: nowhere/vocab.json: no such file")
    code, out, _ = run(repository, tmp_path, "train", "--help")
    assert code == 0
    assert b"--vocab-size" in out
