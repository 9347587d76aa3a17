"""The command line of the tokenizer: train, encode, decode.

``encode`` and ``decode`` are filters whose output is data alone.  What a user can mend ends as one line on
standard error and exit code 2, with nothing half-written.
"""

from __future__ import annotations

import argparse
import difflib
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rlhf_ray.tokenizer.bpe import Tokenizer
from rlhf_ray.tokenizer.trainer import train_bpe

_BLOCK = 1 << 20  # characters of plain text read at a time, cut at a line's end

Report = Callable[[int, int], None]
"""(done, total): how far a phase has come."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and name the nearest flag for one that it doesn't know."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2)

    def refuse_unknown_flags(self, args: Sequence[str]) -> None:
        """End with an error for the first flag that is not this parser's."""
        known = list(self._option_string_actions)
        for arg in args:
            flag = arg.partition("=")[0]
            if flag.startswith("--") and flag != "--" and flag not in known:
                near = difflib.get_close_matches(flag, known, n=1, cutoff=0.0)
                self.error(f"unknown flag {flag}; the nearest is {near[0]} (--help lists all)")


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The whole parser, and that of each command."""
    parser = _Parser(prog="tokenizer.py", description="Train and use a byte-level BPE tokenizer.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,encode,decode}")

    train = commands.add_parser("train", allow_abbrev=False, help="learn a vocabulary from text")
    train.add_argument(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="plain text, or JSONL whose rows have a `text`; either may be .gz",
    )
    train.add_argument(
        "--vocab-size",
        type=int,
        default=4096,
        metavar="N",
        help="tokens of the base vocabulary, 256 bytes included (default 4096)",
    )
    train.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for vocab.json and merges.txt")

    encode = commands.add_parser("encode", allow_abbrev=False, help="UTF-8 on standard input -> a JSON list of ids")
    decode = commands.add_parser("decode", allow_abbrev=False, help="a JSON list of ids on standard input -> text")
    decode.add_argument("--keep-special", action="store_true", help="write special tokens instead of dropping them")
    for command in (encode, decode):
        command.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="folder of the tokenizer")
    return parser, {"train": train, "encode": encode, "decode": decode}


def _row_text(line: bytes, place: str) -> str:
    """The text of one JSONL row; ValueError with its file:line."""
    try:
        row: Any = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{place}: not valid JSON in UTF-8 ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'{place}: a row must be an object with a string under "text"')
    text: str = row["text"]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: the text holds a lone surrogate, which is not valid Unicode") from error
    return text


def read_texts(path: Path, on_read: Callable[[int], None]) -> Iterator[str]:
    """Texts of one file, as they are read; ``on_read`` is told the bytes of each text.

    Raises ValueError with file (and line, for JSONL) for what can't be read.
    """
    packed = path.suffix == ".gz"
    rows = (path.with_suffix("") if packed else path).suffix in (".jsonl", ".ndjson")
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            if rows:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        on_read(len(line))
                        yield _row_text(line, f"{path}:{number}")
            else:
                while lines := file.readlines(_BLOCK):
                    block = b"".join(lines)
                    on_read(len(block))
                    yield block.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); convert the file first") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: the .gz file is damaged ({error}); copy it again") from error


def _print_tenths(done: int, total: int) -> None:
    if done * 10 // total > (done - 1) * 10 // total:
        print(f"merges {done}/{total}", flush=True)


@contextmanager
def _merge_progress() -> Iterator[Report]:
    """Progress of the merges: a bar on a terminal, ten plain lines elsewhere."""
    if not sys.stdout.isatty():
        yield _print_tenths
        return
    from rich.progress import Progress  # slow to import, and --help needs none of it

    with Progress() as progress:
        task = progress.add_task("merges", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _train(args: argparse.Namespace) -> None:
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file; give a folder")
    if missing := [path for path in args.input if not path.is_file()]:
        raise ValueError(f"{missing[0]}: no such file; give existing text or JSONL files to --input")
    read = 0

    def on_read(size: int) -> None:
        nonlocal read
        if (read + size) // 10_000_000 > read // 10_000_000:
            print(f"read {(read + size) // 1_000_000} MB", flush=True)
        read += size

    texts = (text for path in args.input for text in read_texts(path, on_read))
    print(f"training a vocabulary of {args.vocab_size} tokens for {args.output.resolve()}", flush=True)
    with _merge_progress() as on_progress:
        tokenizer = train_bpe(texts, args.vocab_size, on_progress=on_progress)
    tokenizer.save(args.output)
    print(
        f"wrote vocab.json and merges.txt: {tokenizer.base_size} tokens from {read / 1e6:.1f} MB, "
        f"{tokenizer.vocab_size} with the special tokens"
    )
    print("next: python launch/pretrain.py")


def _encode(args: argparse.Namespace) -> None:
    tokenizer = Tokenizer.load(args.tokenizer)
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text ({error}); convert it first") from error
    print(json.dumps(tokenizer.encode(text)))


def _decode(args: argparse.Namespace) -> None:
    tokenizer = Tokenizer.load(args.tokenizer)
    try:
        ids: Any = json.loads(sys.stdin.buffer.read())
    except ValueError as error:
        raise ValueError(f"standard input is not JSON ({error}); give one list of ids") from error
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError("standard input must be one JSON list of whole numbers")
    sys.stdout.buffer.write(tokenizer.decode(ids, skip_special=not args.keep_special).encode("utf-8"))
    sys.stdout.buffer.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parsers()
    if argv and argv[0] in commands:
        commands[argv[0]].refuse_unknown_flags(argv[1:])
    args = parser.parse_args(argv)
    try:
        {"train": _train, "encode": _encode, "decode": _decode}[args.command](args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
