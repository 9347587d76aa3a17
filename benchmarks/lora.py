"""A PPO update of every weight beside one of adapters, over float32 and over packed weights: seconds and memory.

    python benchmarks/lora.py --json lora.json
    python benchmarks/lora.py --size small --rank 8 --rows 16

The update is PPO's own, of a policy and a critic of its own, loaded from folders with random weights, on random rows of
full length.  Each side is a program of its own, so that its peak memory is its own, one after the other.

Left out on purpose: generation, which is the same once adapters are merged.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

from side_by_side import Report, Row, parser, run_program, seconds, shrink  # isort: skip
import torch
from learner import peak_mb, random_rollout
from machine import device
from random_models import SIZES, VOCABULARIES

from rlhf_ray.config import PPO, LoRA
from rlhf_ray.models import GPT2, ValueModel, preset
from rlhf_ray.models.hf_weights import save_policy, save_reward_model
from rlhf_ray.types import Experience
from rlhf_ray.workers.build_learner import build_policy_critic
from rlhf_ray.workers.learner import LearnerWorker

SIDES = {"every weight": None, "adapters": "float32", "adapters over int8": "int8"}
"""How the weights under the adapters are kept, where there are any."""


def write_models(options: argparse.Namespace) -> None:
    """A policy and a reward model with random weights."""
    model = GPT2(preset(options.size, VOCABULARIES[options.size]))
    special = {"pad_id": 0, "bos_id": 0, "eos_id": 0}
    save_policy(model, options.folder / "policy", **special)
    save_reward_model(ValueModel(model), options.folder / "critic", **special)


def make_learner(options: argparse.Namespace) -> LearnerWorker:
    """Policy and critic from their folders."""
    frozen = SIDES[options.side]
    return LearnerWorker(
        partial(
            build_policy_critic,
            "separate",
            options.folder / "policy",
            options.folder / "critic",
            temperature=1.0,
            device=str(device()),
            dtype=torch.float32,
            special={},
            compiled=False,
            checkpointing=False,
            lora=LoRA(rank=options.rank if frozen else 0),
            frozen=frozen or "float32",
            seed=0,
        ),
        PPO(epochs=1, mini_batch_size=options.rows, micro_batch_size=options.micro),
        seed=0,
        total_steps=100,
        response_length=options.response,
        rollout_dtype=torch.float32,
        threads=options.threads,
    )


def measure(options: argparse.Namespace) -> Row:
    """One side: the median update after one that is not counted, and the largest memory so far."""
    program = peak_mb()
    learner, rollout = make_learner(options), random_rollout(options)
    updating = []
    for _ in range(options.repetitions + 1):
        found = learner.evaluate(rollout)
        assert found.values is not None
        experience = Experience(
            rollout=rollout,
            old_logprobs=found.old_logprobs,
            advantages=torch.randn_like(found.values),
            values=found.values,
            returns=found.values + rollout.response_mask,
        )
        updating.append(seconds(lambda experience=experience: learner.update(experience)))  # type: ignore[misc]
    weights = learner.weights(1)
    assert weights is not None
    learned = sum(p.numel() for group in learner.optimiser.param_groups for p in group["params"])
    return {
        "learns": options.side,
        "parameters": learned,
        "update s": statistics.median(updating[1:]),
        "MB above the program": peak_mb() - program,
        "published MB": weights.buffer.nbytes / 2**20,
    }


def main() -> None:
    """Measure every side, or one."""
    options_of = parser(__doc__ and __doc__.splitlines()[0], repetitions=2)
    options_of.add_argument("--size", choices=SIZES, default="mini_xl")
    options_of.add_argument("--rank", type=int, default=16)
    options_of.add_argument("--rows", type=int, default=8, help="rows of the update, which is one optimiser step")
    options_of.add_argument("--micro", type=int, default=4, help="rows of a forward pass")
    options_of.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    options_of.add_argument("--response", type=int, default=64, help="tokens of a response")
    options_of.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options_of.add_argument("--side", choices=SIDES, default="", help=argparse.SUPPRESS)
    options = options_of.parse_args()
    shrink(options, size="tiny", rows=2, micro=2, prompt=4, response=4)
    if options.side:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        print(json.dumps(measure(options)))
        return
    report = Report("lora", options)
    passed = ("size", "rank", "rows", "micro", "prompt", "response", "threads", "repetitions", "folder")
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        write_models(options)
        flags = [f"--{name}={getattr(options, name)}" for name in passed]
        rows = [run_program([sys.executable, __file__, f"--side={side}", *flags]).line for side in SIDES]
    shape = f"{options.rows} x ({options.prompt} + {options.response}) tokens, {options.micro} rows a pass"
    report.table(f"PPO update: {options.size}, rank {options.rank}, {shape}", rows)
    report.close()


if __name__ == "__main__":
    main()
