"""Supervised fine-tuning steps beside transformers with fused AdamW: the same tokens, optimiser and threads.

    python benchmarks/sft.py --size mini_xl --json sft.json
    python benchmarks/sft.py --data "$RLHF_TEST_DATA" --json sft.json     # dialogues too

Rows of one length: forward, backward, clipping and AdamW on full rows, every token but the first a target.  Dialogues:
each step takes the same dialogues on both sides, with the assistant's tokens as targets; ours packs them, transformers
pads micro-batches of them to their longest.  Tokens are those of text, padding not counted.  Each measurement is a
program of its own, so that its peak memory is its own, and the programs take turns.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import random
import resource
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from side_by_side import Report, Row, parser, ratio, run_program, seconds, shrink, words  # isort: skip
import torch
from machine import DTYPES, device
from random_models import SIZES, VOCABULARIES, random_policy, random_prompts
from torch import nn

from rlhf_ray.config import Optimiser
from rlhf_ray.objectives.next_token import Document, NextToken, to_rows
from rlhf_ray.runtime.train_optimiser import apply_gradients, make_optimiser
from rlhf_ray.runtime.train_step import World, accumulate, step_input
from rlhf_ray.shortage import micro_batch
from rlhf_ray.tokenizer import TEMPLATES, Tokenizer
from rlhf_ray.types import Message

Step = list[Document]
"""What one optimiser step learns from."""
LR = 1e-5
MAX_NORM = 1.0


def full_rows(options: argparse.Namespace) -> Iterator[Step]:
    """Steps of rows of one length, without end."""
    tokens = random_prompts(options.size, count=options.rows, length=options.length)
    while True:
        yield [Document(tokens=row, weights=[1.0] * len(row)) for row in tokens]


def dialogues(options: argparse.Namespace) -> Iterator[Step]:
    """Steps of dialogues drawn at random, without end; those that are too long lose their end.

    A model with a smaller vocabulary than theirs gets the ids modulo its own.
    """
    tokenizer = Tokenizer.load(options.data / "tokenizer")
    file = options.data / "sft" / "sgd_train_messages.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in itertools.islice(lines, 8 * options.dialogues)]
    documents = []
    for record in records:
        messages = [Message(role=m["role"], content=m["content"]) for m in record["messages"]]
        ids, answers = TEMPLATES["chat"].conversation_ids(tokenizer, messages)
        weights = [float(answer) for answer in answers[: options.longest]]
        known = [token % VOCABULARIES[options.size] for token in ids[: options.longest]]
        documents.append(Document(tokens=known, weights=weights))
    draw = random.Random(0)
    while True:
        yield draw.sample(documents, options.dialogues)


def run_ours(options: argparse.Namespace) -> Callable[[Step], object]:
    """One step of our SFT."""
    model = random_policy(options.size).to(device()).train().requires_grad_(True)
    objective = NextToken()
    world = World(device=device(), dtype=DTYPES[options.dtype])
    optimiser = make_optimiser(model, Optimiser(lr=LR))
    packing = options.kind == "dialogues"

    def step(documents: Step) -> None:
        rows = to_rows(documents, max_length=options.longest if packing else options.length, packing=packing)
        loss = accumulate(objective, model, step_input(objective, rows, world, micro_batch(options.micro)), world)
        apply_gradients(optimiser, loss, lr=LR, max_grad_norm=MAX_NORM)

    return step


def run_theirs(options: argparse.Namespace) -> Callable[[Step], object]:
    """One step of transformers' GPT-2 with its own loss."""
    from peers.hf_generate import random_model

    model = random_model(options.size).to(device()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    half = options.dtype == "bfloat16"

    def step(documents: Step) -> None:
        targets = sum(sum(weight > 0 for weight in document.weights[1:]) for document in documents)
        for start in range(0, len(documents), options.micro):
            ids, mask, labels = padded(documents[start : start + options.micro])
            with torch.autocast(device().type, dtype=torch.bfloat16, enabled=half):
                out = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=targets)
            out.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def padded(documents: Sequence[Document]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and labels (-100 where there is no target), (B, T) each, as a collator makes them."""
    width = max(len(document.tokens) for document in documents)
    ids = torch.zeros(len(documents), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for b, document in enumerate(documents):
        n = len(document.tokens)
        ids[b, :n] = torch.tensor(document.tokens)
        mask[b, :n] = 1
        targets = torch.tensor(document.weights) > 0
        labels[b, :n] = torch.where(targets, ids[b, :n], -100)
    return ids.to(device()), mask.to(device()), labels.to(device())


SIDES = {"ours": run_ours, "transformers": run_theirs}
KINDS = {"full rows": full_rows, "dialogues": dialogues}


def measure_side(options: argparse.Namespace) -> None:
    """What a program of one side does: print a line with tokens per second and the peak memory."""
    torch.set_num_threads(options.threads)
    batches = KINDS[options.kind](options)
    if options.side == "transformers":
        import peers.hf_generate  # noqa: F401  its memory belongs to this side alone
    before = peak_mb()
    step = SIDES[options.side](options)
    rates, sizes = [], []
    for _ in range(options.steps + 1):
        documents = next(batches)
        tokens = sum(len(document.tokens) for document in documents)
        rates.append(tokens / seconds(lambda documents=documents: step(documents)))  # type: ignore[misc]
        sizes.append(tokens)
    line = {"tokens_per_s": statistics.median(rates[1:]), "peak_mb": peak_mb(), "before_mb": before}
    print(json.dumps({**line, "tokens_per_step": statistics.mean(sizes)}))


def peak_mb() -> float:
    """Largest memory so far in MiB: of the GPU where there is one, else resident."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(options: argparse.Namespace, kind: str, dtype: str) -> list[Row]:
    """Both sides in turn; one row each."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    passed = [f"--{name}={getattr(options, name)}" for name in PASSED if getattr(options, name) is not None]
    for _ in range(options.repetitions):
        for side in SIDES:
            chosen = [f"--side={side}", f"--kind={kind}", f"--dtype={dtype}"]
            found[side].append(run_program([sys.executable, __file__, *chosen, *passed]).line)
    taken = {side: [1 / run["tokens_per_s"] for run in runs] for side, runs in found.items()}
    return [
        {
            "rows": kind,
            "dtype": dtype,
            "": side,
            "tokens/s": 1 / statistics.median(taken[side]),
            "ratio": ratio(taken[side], taken["transformers"]),
            "tokens a step": runs[0]["tokens_per_step"],
            "peak MB": statistics.median(run["peak_mb"] for run in runs),
            "of which before the model": statistics.median(run["before_mb"] for run in runs),
        }
        for side, runs in found.items()
    ]


PASSED = ("size", "rows", "length", "dialogues", "longest", "micro", "steps", "threads", "data")
"""Options that a side's program is given."""


def compare_all(options: argparse.Namespace) -> None:
    """Compare every kind of rows in every dtype."""
    report = Report("sft", options)
    kinds = ["full rows", *(["dialogues"] if options.data else [])]
    rows = [row for kind in kinds for dtype in options.dtypes for row in compare(options, kind, dtype)]
    report.table(f"{options.size}, {options.rows} x {options.length} tokens, {options.dialogues} dialogues", rows)
    report.close()


def main() -> None:
    """Compare, or be one side."""
    options_of = parser(__doc__ and __doc__.splitlines()[0])
    options_of.add_argument("--size", choices=SIZES, default="mini_xl")
    options_of.add_argument("--dtypes", type=words, default=["float32", "bfloat16"])
    options_of.add_argument("--rows", type=int, default=8, help="full rows of a step")
    options_of.add_argument("--length", type=int, default=256, help="tokens of a full row")
    options_of.add_argument("--data", type=Path, default=os.environ.get("RLHF_TEST_DATA"), help="corpora")
    options_of.add_argument("--dialogues", type=int, default=32, help="dialogues of a step")
    options_of.add_argument("--longest", type=int, default=512, help="tokens of a dialogue, and of a packed row")
    options_of.add_argument("--micro", type=int, default=8, help="rows of one forward pass")
    options_of.add_argument("--steps", type=int, default=3, help="counted steps of one program")
    options_of.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options_of.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options_of.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    options = options_of.parse_args()
    shrink(options, size="tiny", dtypes=["float32"], rows=2, length=16, dialogues=2, longest=64, steps=1)
    if options.side:
        measure_side(options)
    else:
        compare_all(options)


if __name__ == "__main__":
    main()
