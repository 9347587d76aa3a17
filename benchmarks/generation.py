"""Tokens per second of the engine beside transformers' generate: same process, weights, prompts and threads.

    python benchmarks/generation.py --sizes mini_xl --batches 1,8,32,64 --json generation.json
    python benchmarks/generation.py --device cuda --batches 256 --dtypes bfloat16

Rows draw from the full softmax and never end early.  The share of the roofline is the least time over the time
taken: a decode step reads the weights once and every row's cache once, or does its multiplications, whichever takes
longer at the limits measured here; a prompt's multiplications come on top.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from side_by_side import Report, Row, best, interleave, numbers, parser, ratio, shrink, words  # isort: skip
import numpy as np
import torch
from machine import DTYPES, Limits, device
from peers import hf_generate
from random_models import SIZES, eos_id, pad_id, random_engine, random_policy, random_prompts

from rlhf_ray.generation import Sampling, row_uniforms
from rlhf_ray.models import GPT2, GPT2Config
from rlhf_ray.models.hf_weights import save_policy


def least_seconds(limits: Limits, config: GPT2Config, dtype: str, *, batch: int, prompt: int, new: int) -> float:
    """What the limits allow for one call."""
    width, layers = config.n_embd, config.n_layer
    blocks = 12 * layers * width**2  # weights that multiply, apart from the head
    head = config.vocab_size * width
    size = DTYPES[dtype].itemsize
    total = limits.seconds(dtype, flops=2 * blocks * batch * (prompt - 1), read=0)
    for length in range(prompt, prompt + new):
        cached = 2 * layers * width * length  # keys and values of one row
        flops = batch * 2 * (blocks + head + cached)
        total += limits.seconds(dtype, flops=flops, read=size * (blocks + head + batch * cached))
    return total


def sides(
    model: GPT2, size: str, dtypes: list[str], options: argparse.Namespace, batch: int
) -> dict[str, Callable[[], object]]:
    """Ours and theirs in every dtype, each a call that generates one batch."""
    prompts = random_prompts(size, count=batch, length=options.prompt)
    uniforms = np.stack([row_uniforms(0, 0, row, options.new) for row in range(batch)])
    sampling = Sampling(max_new_tokens=options.new)
    calls: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_policy(model, folder, pad_id=pad_id(size), bos_id=pad_id(size) + 1, eos_id=eos_id(size))
        for dtype in dtypes:
            engine = random_engine(size, max_rows=batch, dtype=DTYPES[dtype], kind=options.engine)
            lengths = {len(completion.tokens) for completion in engine.generate(prompts, uniforms, sampling)}
            assert lengths == {options.new}, "a row ended early"
            calls[f"ours {dtype}"] = partial(engine.generate, prompts, uniforms, sampling)
            theirs = hf_generate.load(Path(folder), dtype=DTYPES[dtype], device=device())
            ids = torch.tensor(prompts, device=device())
            calls[f"theirs {dtype}"] = partial(hf_generate.generate, theirs, ids, options.new)
    return calls


def measure(report: Report, size: str, batch: int) -> tuple[list[Row], Row]:
    """One row a dtype, and one for the best dtype of each."""
    options = report.options
    model = random_policy(size)
    calls = sides(model, size, options.dtypes, options, batch)
    times = interleave(calls, repetitions=options.repetitions)
    tokens = batch * options.new
    rows: list[Row] = []
    for dtype in options.dtypes:
        ours, theirs = times[f"ours {dtype}"], times[f"theirs {dtype}"]
        assert report.limits is not None
        least = least_seconds(report.limits, model.config, dtype, batch=batch, prompt=options.prompt, new=options.new)
        rows.append(
            {
                "size": size,
                "batch": batch,
                "dtype": dtype,
                "ours, tokens/s": tokens / statistics.median(ours),
                "transformers, tokens/s": tokens / statistics.median(theirs),
                "ratio": ratio(ours, theirs),
                "ours, share of the roofline": least / statistics.median(ours),
                "transformers', share": least / statistics.median(theirs),
            }
        )
    fastest, rival = best(times, "ours"), best(times, "theirs")
    compared = {"size": size, "batch": batch, "ours": fastest.split()[1], "transformers": rival.split()[1]}
    return rows, {**compared, "ratio": ratio(times[fastest], times[rival])}


def choose_device(name: str) -> None:
    """Let everything that is measured find this device; the program ends where it is absent."""
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for a GPU
    if name == "cuda" and device().type == "cpu":
        raise SystemExit("error: --device cuda: torch sees no CUDA device here; take auto or cpu")


def main() -> None:
    """Measure every size and batch."""
    options_of = parser(__doc__ and __doc__.splitlines()[0])
    options_of.add_argument("--sizes", type=words, default=["mini_xl"], help=f"among {', '.join(SIZES)}")
    options_of.add_argument("--dtypes", type=words, default=["float32", "bfloat16"])
    options_of.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: CUDA if any")
    options_of.add_argument("--engine", default="auto", help="auto, native or torch")
    options_of.add_argument("--batches", type=numbers, default=[1, 8, 32, 64])
    options_of.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    options_of.add_argument("--new", type=int, default=128, help="tokens of a response")
    options = options_of.parse_args()
    shrink(options, sizes=["tiny"], dtypes=["float32"], batches=[2], prompt=8, new=8)
    choose_device(options.device)
    report = Report("generation", options, limits=options.dtypes)
    cases = [measure(report, size, batch) for size in options.sizes for batch in options.batches]
    report.table(
        f"prompt {options.prompt}, {options.new} new tokens, full softmax", [row for rows, _ in cases for row in rows]
    )
    if len(options.dtypes) > 1:
        report.table("best dtype of each", [row for _, row in cases])
    report.close()


if __name__ == "__main__":
    main()
