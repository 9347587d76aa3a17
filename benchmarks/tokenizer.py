"""Encode speed beside `tokenizers` and `tiktoken` on one vocabulary and text, and the seconds of a training.

    python benchmarks/tokenizer.py --data "$RLHF_TEST_DATA" --json tokenizer.json

All three encode one document at a time on one core.  The first pass of ours, with an empty word cache, is told on its
own.  Without the corpora, the shipped demo text is encoded with a vocabulary trained on it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

from side_by_side import REPOSITORY, Report, interleave, parser, ratio, seconds, shrink  # isort: skip
import tiktoken
import tokenizers

from rlhf_ray.tokenizer import Tokenizer, train_bpe, write_hf_tokenizer

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

Encode = Callable[[str], list[int]]


def read_texts(options: argparse.Namespace) -> list[str]:
    """Film reviews of the corpora, else the paragraphs of the demo text."""
    if options.data is None:
        return (REPOSITORY / "data/raw/pretrain_corpus.txt").read_text(encoding="utf-8").split("\n\n")
    with gzip.open(options.data / "pretrain/imdb_train.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def head(texts: list[str], megabytes: float) -> list[str]:
    """The first texts that together have so many megabytes."""
    sizes = accumulate(len(text.encode()) for text in texts)
    return texts[: sum(total <= megabytes * 1e6 for total in sizes)]


def encoders(folder: Path) -> dict[str, Encode]:
    """The three libraries on the vocabulary of a folder."""
    ours = Tokenizer.load(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = ours.vocabulary
    made = [vocabulary.tokens[a] + vocabulary.tokens[b] for a, b in vocabulary.merges]
    single = [token for token in vocabulary.tokens if len(token) == 1]
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    ranks = {token: ids[token] for token in [*single, *made]}
    encoding = tiktoken.Encoding("local", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return {
        "rlhf_ray": ours.encode,
        "tokenizers": lambda text: theirs.encode(text, add_special_tokens=False).ids,
        "tiktoken": encoding.encode_ordinary,
    }


def encode_all(encode: Encode, texts: list[str]) -> None:
    """One pass over the texts."""
    for text in texts:
        encode(text)


def measure_encoding(report: Report, folder: Path, texts: list[str]) -> None:
    """MB/s of each encoder, and how many times as fast as each peer ours is."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    found = encoders(folder)
    for name, encode in found.items():
        assert all(encode(text) == found["rlhf_ray"](text) for text in texts[:200]), f"{name} gives other ids"
    first = megabytes / seconds(partial(encode_all, Tokenizer.load(folder).encode, texts))
    calls = {name: partial(encode_all, encode, texts) for name, encode in found.items()}
    times = interleave(calls, repetitions=report.options.repetitions)
    report.table(
        f"encoding {megabytes:.2f} MB; our first pass, with an empty word cache, {first:.2f} MB/s",
        [
            {
                "library": name,
                "MB/s": megabytes / statistics.median(taken),
                "ours is faster by": ratio(times["rlhf_ray"], taken),
            }
            for name, taken in times.items()
        ],
    )


def main() -> None:
    """Measure encoding and training."""
    options_of = parser(__doc__ and __doc__.splitlines()[0], repetitions=5)
    options_of.add_argument("--data", type=Path, default=os.environ.get("RLHF_TEST_DATA"), help="folder of the corpora")
    options_of.add_argument("--megabytes", type=float, default=5.0, help="text per pass")
    options_of.add_argument("--vocab-size", type=int, default=4096, help="of the training that is timed")
    options = options_of.parse_args()
    shrink(options, data=None, megabytes=0.02, vocab_size=300)
    report = Report("tokenizer", options)
    texts = read_texts(options)
    corpus = head(texts, options.megabytes) if options.quick else texts
    trained: list[Tokenizer] = []
    taken = seconds(lambda: trained.append(train_bpe(corpus, options.vocab_size)))
    with tempfile.TemporaryDirectory() as folder:
        write_hf_tokenizer(folder, trained[0], "plain")
        chosen = Path(folder) if options.data is None else options.data / "tokenizer"
        measure_encoding(report, chosen, head(texts, options.megabytes))
    size = sum(len(text.encode()) for text in corpus) / 1e6
    report.table("training", [{"MB": size, "vocabulary": options.vocab_size, "seconds": taken}])
    report.close()


if __name__ == "__main__":
    main()
