"""The command line of the data lint: ``data.py check FILE ...``.

Ends with 0 when every stage can read the files, with 2 when one would stop.  Left out on purpose: torch, until the
command line is known to be good.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.config import repository_path

if TYPE_CHECKING:
    from rlhf_ray.data.lint import Ruler

VOCABULARY = Path("data/vocab")


def main(argv: Sequence[str] | None = None) -> int:
    """Check files; returns the exit code."""
    options = _parser().parse_args(argv)
    from rlhf_ray.data.lint_report import check

    try:
        good = check(
            [repository_path(path) for path in options.files],
            options.kind,
            _ruler(options),
            most=options.rows,
            max_bad_rows=options.max_bad_rows,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if good else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="data.py", description="Look at data files before they are trained on.")
    check = parser.add_subparsers(dest="command", required=True).add_parser("check", help="say what files hold")
    check.add_argument("files", nargs="+", type=Path, metavar="FILE")
    kinds, templates = ["text", "chats", "pairs", "prompts"], ["chat", "alpaca", "plain"]
    check.add_argument("--kind", choices=kinds, help="what the rows are; by default their keys tell")
    check.add_argument("--tokenizer", type=Path, metavar="DIR", help=f"folder of a vocabulary (default {VOCABULARY})")
    check.add_argument("--template", choices=templates, default="chat", help="how rows become tokens (default chat)")
    check.add_argument("--max-length", type=int, default=256, metavar="N", help="tokens of a row (default 256)")
    check.add_argument("--rows", type=int, default=0, metavar="N", help="rows of each file to look at; 0: all")
    check.add_argument("--max-bad-rows", type=int, default=0, metavar="N", help="bad rows that a stage stands")
    return parser


def _ruler(options: argparse.Namespace) -> Ruler:
    """Tokens of the vocabulary that is named or there; without one, characters."""
    from rlhf_ray.data.lint import Ruler
    from rlhf_ray.tokenizer import TEMPLATES, Tokenizer

    folder = repository_path(options.tokenizer or VOCABULARY)
    if options.tokenizer is None and not (folder / "vocab.json").is_file():
        return Ruler()
    template = TEMPLATES[options.template]
    return Ruler(tokenizer=Tokenizer.load(folder), template=template, limit=options.max_length)
