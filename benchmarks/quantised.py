"""What a policy loses and saves when its weights are kept in fewer bits: perplexity on a text, bytes, seconds.

    python benchmarks/quantised.py --policy checkpoints/pretrained/default --texts data/raw/prompts_heldout.txt

Every storage of ``memory.frozen`` reads the same tokens of each text.  Beside the perplexity stands how far it is from
bfloat16's, how far a token's log-probability moves from float32's on average, and how far the sum over 48 tokens in a
row moves at most, which is what the first KL of a PPO run with such a reference can be.

Left out on purpose: benchmarks of tasks, which models this small do not pass.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

from side_by_side import Report, Row, interleave, parser, shrink, words  # isort: skip
import torch
from machine import device
from random_models import write_models, write_prompts
from torch import Tensor

from rlhf_ray.evaluation.perplexity import Passages, read_rows, to_passages
from rlhf_ray.generation.load import load_policy_with_tokenizer
from rlhf_ray.models import GPT2
from rlhf_ray.models.folders import model_folder
from rlhf_ray.models.hf_weights import load_policy
from rlhf_ray.objectives.next_token import collate, target_logprobs
from rlhf_ray.tokenizer import find_template

KINDS = ("float32", "bfloat16", "int8", "int4")
SEQUENCE = 48
"""Tokens of a response in the shipped configurations."""


def read(policy: GPT2, passages: Passages, options: argparse.Namespace) -> Tensor:
    """(n,) float64: the log-probability of every token to predict."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(passages.rows), options.batch):
            batch = collate(passages.rows[start : start + options.batch])
            logprobs, mask = target_logprobs(policy, {name: x.to(device()) for name, x in batch.items()})
            found.append(logprobs[mask.to(logprobs.device)].double().cpu())
    return torch.cat(found)


def megabytes(policy: GPT2) -> float:
    """Of all weights."""
    return sum(x.nbytes for x in (*policy.parameters(), *policy.buffers())) / 2**20


def passages_of(text: Path, options: argparse.Namespace) -> Passages:
    """The first rows of a text."""
    policy, tokenizer, template = load_policy_with_tokenizer(options.policy)
    width = min(options.length, policy.config.n_positions)
    whole = to_passages(read_rows(text), tokenizer, find_template(template or "chat"), width)
    return Passages(rows=whole.rows[: options.rows], cut=whole.cut)


def measure(text: Path, options: argparse.Namespace) -> list[Row]:
    """A row for every storage."""
    passages, folder = passages_of(text, options), model_folder(options.policy)
    policies = {kind: load_policy(folder, device=device(), frozen=kind).eval() for kind in options.kinds}
    found = {kind: read(policy, passages, options) for kind, policy in policies.items()}
    calls = {kind: lambda policy=policy: read(policy, passages, options) for kind, policy in policies.items()}
    times = interleave(calls, repetitions=options.repetitions)
    rows = []
    for kind, logprobs in found.items():
        moved = logprobs - found["float32"]
        sums = moved[: len(moved) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE).sum(1)
        perplexity = math.exp(-logprobs.mean())
        rows.append(
            {
                "storage": kind,
                "weights MB": megabytes(policies[kind]),
                "tokens": len(logprobs),
                "perplexity": f"{perplexity:.3f}",
                "to bfloat16's": f"{perplexity / math.exp(-found['bfloat16'].mean()) - 1:+.3%}",
                "nats a token": float(moved.abs().mean()),
                f"at most in {SEQUENCE}": float(sums.abs().max()),
                "s": min(times[kind]),
            }
        )
    return rows


def main() -> None:
    """Measure on every text."""
    options_of = parser(__doc__ and __doc__.splitlines()[0], repetitions=1)
    options_of.add_argument("--policy", type=Path, default=Path("checkpoints/pretrained/default"), help="folder or run")
    options_of.add_argument("--texts", type=words, default=["data/raw/prompts_heldout.txt"], help="text or dialogues")
    options_of.add_argument("--kinds", type=words, default=list(KINDS))
    options_of.add_argument("--rows", type=int, default=64, help="of each text")
    options_of.add_argument("--length", type=int, default=256, help="tokens of a row")
    options_of.add_argument("--batch", type=int, default=8, help="rows of a forward pass")
    options = options_of.parse_args()
    shrink(options, rows=2, length=32, batch=2)
    report = Report("quantised", options)
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            write_models(Path(folder), "tiny")
            write_prompts(Path(folder) / "text.txt", "tiny", count=8, length=40)
            options.policy, options.texts = Path(folder) / "policy", [str(Path(folder) / "text.txt")]
        for text in options.texts:
            report.table(f"{Path(text).name}", measure(Path(text), options))
    report.close()


if __name__ == "__main__":
    main()
