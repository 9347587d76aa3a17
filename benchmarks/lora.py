"""A PPO update of every weight beside one of adapters, over float32 and over packed weights: seconds and memory.

    python benchmarks/lora.py --json lora.json
    python benchmarks/lora.py --size small --rank 8 --rows 16

The update is PPO's own, of a policy and a critic of its own, loaded from folders with random weights, on random rows of
full length.  Each side is a program of its own, so that its peak memory is its own; sides take turns, a round of all
after the other, so that a machine that slows down slows them alike.

Left out on purpose: generation, which is the same once adapters are merged.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from side_by_side import Report, Row, parser, ratio, run_program, seconds, shrink  # isort: skip
import torch
from learner import made_up_experience, open_pair, peak_mb, random_rollout, worker
from random_models import SIZES, write_models

from rlhf_ray.config import PPO

SIDES = {"every weight": None, "adapters": "float32", "adapters over int8": "int8"}
"""How the weights under the adapters are kept, where there are any."""


def measure(options: argparse.Namespace) -> Row:
    """One side: an update after one that is not counted, and the largest memory so far."""
    program = peak_mb()
    frozen = SIDES[options.side]
    ppo = PPO(epochs=1, mini_batch_size=options.rows, micro_batch_size=options.micro)
    pair = open_pair(options.folder, rank=options.rank, frozen=frozen) if frozen else open_pair(options.folder)
    learner, rollout = worker(pair, ppo, options), random_rollout(options)
    for _ in range(2):
        experience = made_up_experience(learner, rollout)
        took = seconds(lambda experience=experience: learner.update(experience))  # type: ignore[misc]
    weights = learner.weights(1)
    assert weights is not None
    learned = sum(p.numel() for group in learner.optimiser.param_groups for p in group["params"])
    return {
        "learns": options.side,
        "parameters": learned,
        "update s": took,
        "MB above the program": peak_mb() - program,
        "published MB": weights.buffer.nbytes / 2**20,
    }


def row(rounds: Sequence[Row], whole: Sequence[Row]) -> Row:
    """A side's medians over its rounds, and its speed beside that of every weight in the same rounds."""
    took, theirs = ([found["update s"] for found in side] for side in (rounds, whole))
    medians = {
        name: statistics.median(found[name] for found in rounds) for name in ("update s", "MB above the program")
    }
    return {**rounds[0], **medians, "as fast as every weight": ratio(took, theirs)}


def main() -> None:
    """Measure every side, or one."""
    options_of = parser(__doc__ and __doc__.splitlines()[0], repetitions=3)
    options_of.add_argument("--size", choices=SIZES, default="mini_xl")
    options_of.add_argument("--rank", type=int, default=16)
    options_of.add_argument("--rows", type=int, default=8, help="rows of the update, which is one optimiser step")
    options_of.add_argument("--micro", type=int, default=4, help="rows of a forward pass")
    options_of.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    options_of.add_argument("--response", type=int, default=64, help="tokens of a response")
    options_of.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options_of.add_argument("--side", choices=SIDES, default="", help=argparse.SUPPRESS)
    options = options_of.parse_args()
    shrink(options, size="tiny", rows=2, micro=2, prompt=4, response=4, repetitions=1)
    if options.side:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        print(json.dumps(measure(options)))
        return
    report = Report("lora", options)
    passed = ("size", "rank", "rows", "micro", "prompt", "response", "threads", "repetitions", "folder")
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        write_models(options.folder, options.size)
        flags = [f"--{name}={getattr(options, name)}" for name in passed]
        programs = {side: [sys.executable, __file__, f"--side={side}", *flags] for side in SIDES}
        rounds = [
            {side: run_program(program).line for side, program in programs.items()} for _ in range(options.repetitions)
        ]
    sides = {side: [found[side] for found in rounds] for side in SIDES}
    rows = [row(found, sides["every weight"]) for found in sides.values()]
    shape = f"{options.rows} x ({options.prompt} + {options.response}) tokens, {options.micro} rows a pass"
    report.table(f"PPO update: {options.size}, rank {options.rank}, {shape}", rows)
    report.close()


if __name__ == "__main__":
    main()
