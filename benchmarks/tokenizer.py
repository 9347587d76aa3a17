"""Encode speed beside `tokenizers` and `tiktoken` on one vocabulary and text, and the seconds of a training.

All three encode one document at a time on one core, in turn within each round, so that a busy machine slows
them alike; every figure is a median over the rounds, and a ratio is the median of the rounds' ratios.  The
first pass of ours, with an empty word cache, is printed on its own.

    python benchmarks/tokenizer.py --data "$RLHF_TEST_DATA" --json out.json
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import tiktoken
import tokenizers

from rlhf_ray.tokenizer import Tokenizer, train_bpe

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

Encode = Callable[[str], list[int]]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "tiktoken": tiktoken.__version__,
    }


def peers(folder: Path, ours: Tokenizer) -> dict[str, Encode]:
    """The two libraries on the vocabulary of the folder."""
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = ours.vocabulary
    made = [vocabulary.tokens[a] + vocabulary.tokens[b] for a, b in vocabulary.merges]
    single = [token for token in vocabulary.tokens if len(token) == 1]
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    ranks = {token: ids[token] for token in [*single, *made]}
    encoding = tiktoken.Encoding("local", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return {
        "tokenizers": lambda text: theirs.encode(text, add_special_tokens=False).ids,
        "tiktoken": encoding.encode_ordinary,
    }


def seconds(encode: Encode, texts: list[str]) -> float:
    """Wall-clock seconds of one pass over the texts."""
    start = time.perf_counter()
    for text in texts:
        encode(text)
    return time.perf_counter() - start


def measure_encode(folder: Path, texts: list[str], rounds: int) -> dict[str, Any]:
    """MB/s of each encoder (medians), and how many times as fast as each peer ours is."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ours = Tokenizer.load(folder)
    encoders: dict[str, Encode] = {"rlhf_ray": ours.encode, **peers(folder, ours)}
    for name, encode in encoders.items():
        assert all(encode(text) == ours.encode(text) for text in texts[:200]), f"{name} gives other ids"
    first = megabytes / seconds(Tokenizer.load(folder).encode, texts)
    times: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(rounds):
        for name, encode in encoders.items():
            times[name].append(seconds(encode, texts))
    ratios = {
        name: statistics.median(b / a for a, b in zip(times["rlhf_ray"], times[name], strict=True)) for name in encoders
    }
    return {
        "megabytes": round(megabytes, 2),
        "first_pass_mb_per_s": round(first, 2),
        "mb_per_s": {name: round(megabytes / statistics.median(t), 2) for name, t in times.items()},
        "times_as_fast_as": {name: round(ratio, 2) for name, ratio in ratios.items() if name != "rlhf_ray"},
    }


def main() -> None:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=os.environ.get("RLHF_TEST_DATA"), help="folder of the corpora")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=5.0, help="text per pass")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the training that is timed")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    if args.data is None:
        parser.error("give --data, or set RLHF_TEST_DATA")
    with gzip.open(args.data / "pretrain/imdb_train.jsonl.gz", "rt", encoding="utf-8") as file:
        texts: list[str] = [json.loads(line)["text"] for line in file]
    sizes = [len(text.encode()) for text in texts]
    count = sum(total <= args.megabytes * 1e6 for total in accumulate(sizes))
    result: dict[str, Any] = {"machine": machine()}
    result["encode"] = measure_encode(args.data / "tokenizer", texts[:count], args.rounds)
    start = time.perf_counter()
    train_bpe(texts, args.vocab_size)
    result["train"] = {
        "megabytes": round(sum(sizes) / 1e6, 2),
        "vocab_size": args.vocab_size,
        "seconds": round(time.perf_counter() - start, 2),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
