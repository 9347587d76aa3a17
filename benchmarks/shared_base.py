"""What a LoRA run's processes take of host memory when each has a copy of the base, and when all read one.

    python benchmarks/shared_base.py --json shared_base.json
    python benchmarks/shared_base.py --sizes small --kinds int8

The processes are real ones: a learner after an update, two rollout workers after a batch, and a reward worker that has
scored one with a reward model trained as adapters over the same policy.  All of them are there when their memory is
read: the proportional set size, in which a page that several processes have counts for each in part, so that the sum is
what the machine has given.  A run with copies and one with a shared base follow each other.

Left out on purpose: Ray and the driver, which hold no weights; peaks, which ``memory_plan.py`` measures; GPUs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from side_by_side import REPOSITORY, Report, Row, parser, shrink, words  # isort: skip
import torch
from learner import made_up_experience, random_rollout
from random_models import SIZES, write_world

from rlhf_ray.config import LoRA, PPOConfig, load
from rlhf_ray.crews import worker_arguments
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.models.adapter_folders import ADAPTER, Base, save_adapter, save_bases
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.hf_weights import load_policy
from rlhf_ray.models.lora import with_adapters
from rlhf_ray.ppo_inputs import read_inputs
from rlhf_ray.workers.learner import LearnerWorker
from rlhf_ray.workers.reward import RewardWorker
from rlhf_ray.workers.rollout import RolloutWorker
from rlhf_ray.workers.weights import export_weights

ROLES = {"learner": LearnerWorker, "rollout 1": RolloutWorker, "rollout 2": RolloutWorker, "reward": RewardWorker}
READY = "ready"


def write_all(folder: Path, options: argparse.Namespace, kind: str, *, shared: bool) -> Path:
    """Models, of which the reward model is adapters over the policy, and a configuration; returns its file."""
    lora, policy = LoRA(rank=options.rank), folder / "policy"
    file = write_world(
        folder,
        options.size,
        prompts=options.rows,
        length=options.prompt,
        device="cpu",
        batch_size=options.rows,
        rollout_threads=options.threads,
        lora={"rank": options.rank},
        memory={"frozen": kind, "share_base": shared},
        generation={"prompt_length": options.prompt, "response_length": options.response},
        ppo={"mini_batch_size": options.rows, "micro_batch_size": options.micro, "epochs": 1},
    )
    base = Base.of(policy)
    save_adapter(ValueModel(with_adapters(load_policy(policy), lora, seed=1)), folder / "reward" / ADAPTER, lora, base)
    save_bases(folder / "reward", {"policy": base})
    return file


def configured(file: Path) -> PPOConfig:
    """The configuration in a file."""
    return load(PPOConfig, ["--config", str(file)])


def work(role: str, file: Path, options: argparse.Namespace) -> None:
    """Build a role's worker, have it do what it does in a step, and wait."""
    torch.manual_seed(0)
    config = configured(file)
    made: Any = ROLES[role](**worker_arguments(config, read_inputs(config))[ROLES[role]])
    rollout = random_rollout(options)
    if isinstance(made, LearnerWorker):
        made.update(made_up_experience(made, rollout))
    elif isinstance(made, RolloutWorker):
        made.update_weights(export_weights(made.published, 0, torch.float32))
        made.generate(PromptStream(len(made.prompts), options.rows, seed=0).take(0), 0)
    else:
        made.score(rollout)
    made.sleep()
    print(READY, flush=True)
    sys.stdin.readline()


def proportional_mb(process: int) -> float:
    """MiB of a process, in which shared pages count in part."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


@contextmanager
def at_work(file: Path, options: argparse.Namespace) -> Iterator[dict[str, int]]:
    """The processes of all roles, each of which has done its work; by role."""
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        for role in options.roles:
            flags = [f"--{name}={getattr(options, name)}" for name in PASSED]
            command = [sys.executable, __file__, f"--role={role}", f"--file={file}", *flags]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            processes[role] = process = subprocess.Popen(command, text=True, cwd=REPOSITORY, **pipes)
            assert process.stdout
            if READY not in process.stdout.read(len(READY)):
                raise SystemExit(f"error: {role} has not come to its end")
        yield {role: process.pid for role, process in processes.items()}
    finally:
        for process in processes.values():
            process.communicate("that is all\n")


PASSED = ("size", "threads", "rows", "prompt", "response", "micro")
"""Options that a role's program is given."""


def measure(kind: str, options: argparse.Namespace) -> list[Row]:
    """A row a role, and one for all of them."""
    found: dict[str, dict[str, float]] = {}
    for way, shared in (("copies", False), ("one base", True)):
        with tempfile.TemporaryDirectory() as name:
            os.environ["RLHF_RAY_CACHE"] = str(options.cache)
            file = write_all(Path(name), options, kind, shared=shared)
            if (base := read_inputs(configured(file)).base) and shared:
                base.file()  # which a run's driver does
            with at_work(file, options) as processes:
                found[way] = {role: proportional_mb(process) for role, process in processes.items()}
                found[way]["all"] = sum(found[way].values())
    return [
        {"role": role, **{f"{way}, MB": found[way][role] for way in found}}
        | {"less": found["copies"][role] - found["one base"][role]}
        for role in found["copies"]
    ]


def main() -> None:
    """Measure every size and kind, or be one process."""
    options_of = parser(__doc__ and __doc__.splitlines()[0], repetitions=1)
    options_of.add_argument("--sizes", type=words, default=["mini_xl", "small"])
    options_of.add_argument("--kinds", type=words, default=["float32", "int8"], help="of memory.frozen")
    options_of.add_argument("--roles", type=words, default=list(ROLES))
    options_of.add_argument("--rank", type=int, default=16)
    options_of.add_argument("--rows", type=int, default=8, help="of a batch, which is one optimiser step")
    options_of.add_argument("--micro", type=int, default=2, help="rows of a forward pass")
    options_of.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    options_of.add_argument("--response", type=int, default=32, help="tokens of a response")
    options_of.add_argument("--size", choices=SIZES, default="mini_xl", help=argparse.SUPPRESS)
    options_of.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    options_of.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = options_of.parse_args()
    shrink(options, sizes=["tiny"], kinds=["int8"], roles=["rollout 1"], rows=2, micro=1, prompt=4, response=4)
    if options.role:
        work(options.role, options.file, options)
        return
    report = Report("shared_base", options)
    with tempfile.TemporaryDirectory() as cache:
        options.cache = cache
        for size, kind in itertools.product(options.sizes, options.kinds):
            options.size = size
            shape = f"{options.rows} x ({options.prompt} + {options.response}) tokens"
            title = f"proportional set size: {size} in {kind}, LoRA of rank {options.rank}, {shape}"
            report.table(title, measure(kind, options))
    report.close()


if __name__ == "__main__":
    main()
