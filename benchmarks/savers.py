"""What each saver of memory makes of the learner's peak, and what a generator gives back when it sleeps.

    python benchmarks/savers.py --json savers.json
    python benchmarks/savers.py --rows 64 --micro 32

The learner is PPO's own, with a critic of its own: two optimiser steps on random rows of full length, so that
gradients, moments and a forward pass's activations are there together.  Each setting is a program of its own; its peak
is that of its private memory, libraries and mapped files left out.  Times are those of a machine that others may use.

Left out on purpose: offload, which needs a GPU; ``learner.py`` measures what full logits would take.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import Report, Row, parser, run_program, seconds, shrink  # isort: skip
import numpy as np
import torch
from learner import made_up_experience, open_pair, random_rollout, worker
from machine import device
from random_models import SIZES, random_engine, random_prompts, write_models

from rlhf_ray.config import PPO
from rlhf_ray.generation import Sampling
from rlhf_ray.workers.meter import give_back, peak_memory

SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "activation checkpointing": {"checkpointing": True},
    "moments in 8 bits": {"bits": 8},
    "both": {"checkpointing": True, "bits": 8},
    "LoRA of rank 16": {"rank": 16},
    "LoRA, int8 base, checkpointing": {"rank": 16, "frozen": "int8", "checkpointing": True},
}
MIB = 2**20


def measure_learner(options: argparse.Namespace) -> Row:
    """Peak and seconds of two optimiser steps."""
    setting = dict(SETTINGS[options.setting])
    bits = setting.pop("bits", 32)
    ppo = PPO(epochs=1, mini_batch_size=options.rows // 2, micro_batch_size=options.micro)
    learner = worker(open_pair(options.folder, **setting), ppo, options, bits=bits)
    experience = made_up_experience(learner, random_rollout(options))
    took = seconds(lambda: learner.update(experience))
    return {"savers": options.setting, "peak MB": peak_memory() / MIB, "s": took}


def resident_mb() -> float:
    """Now: of the GPU where there is one."""
    if device().type == "cuda":
        return torch.cuda.memory_reserved() / MIB
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096 / MIB


def measure_sleep(options: argparse.Namespace) -> Row:
    """A generator's memory after a batch of full length, and after it has given back what it can make again."""
    length = options.prompt + options.response
    engine = random_engine(options.size, max_rows=options.cache_rows)
    prompts = random_prompts(options.size, count=options.cache_rows, length=length - 2)
    uniforms = np.random.default_rng(0).random((len(prompts), 2))
    sampling = Sampling(max_new_tokens=2)
    took = seconds(lambda: engine.generate(prompts, uniforms, sampling))
    awake = resident_mb()
    engine.release()
    give_back()
    asleep = resident_mb()
    again = seconds(lambda: engine.generate(prompts, uniforms, sampling))
    return {"awake MB": awake, "asleep MB": asleep, "first batch s": took, "batch after sleep s": again}


def child(options: argparse.Namespace, setting: str) -> Row:
    """One measurement in a program of its own."""
    flags = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in PASSED]
    flags += ["--quick"] if options.quick else []
    return run_program([sys.executable, __file__, f"--setting={setting}", *flags]).line


PASSED = ("size", "threads", "rows", "prompt", "response", "micro", "cache_rows", "folder")
"""Options that a measurement's program is given."""


def main() -> None:
    """Measure everything, or one setting."""
    options_of = parser(__doc__ and __doc__.splitlines()[0], repetitions=1)
    options_of.add_argument("--size", choices=SIZES, default="mini_xl")
    options_of.add_argument("--rows", type=int, default=4, help="of two optimiser steps")
    options_of.add_argument("--micro", type=int, default=2, help="rows of a forward pass")
    options_of.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    options_of.add_argument("--response", type=int, default=256, help="tokens of a response")
    options_of.add_argument("--cache-rows", type=int, default=32, help="rows that are generated at once")
    options_of.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options_of.add_argument("--setting", help=argparse.SUPPRESS)
    options = options_of.parse_args()
    shrink(options, size="tiny", rows=4, micro=1, prompt=4, response=4, cache_rows=2)
    if options.setting:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        print(json.dumps(measure_sleep(options) if options.setting == "sleep" else measure_learner(options)))
        return
    report = Report("savers", options)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        write_models(options.folder, options.size)
        shape = f"{options.micro} x ({options.prompt} + {options.response}) tokens a forward pass"
        report.table(f"learner: {options.size}, {shape}", [child(options, setting) for setting in SETTINGS])
        shape = f"{options.cache_rows} x {options.prompt + options.response} tokens"
        report.table(f"generator: {options.size}, {shape}", [child(options, "sleep")])
    report.close()


if __name__ == "__main__":
    main()
