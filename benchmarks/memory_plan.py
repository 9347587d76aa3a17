"""What the planner says that a run's processes need of host memory, beside what they have had at most.

    python benchmarks/memory_plan.py --json memory_plan.json
    python benchmarks/memory_plan.py --sizes mini_xl --rows 16

Every run is ``launch/ppo.py`` on models with random weights, prompts of one length and responses of full length, which
is what a plan is made for.  Both figures are those of the run's own ``memory.json``: private memory, so that libraries
and Ray's store, which processes share, count for nobody.

Left out on purpose: GPUs, which are ``gpu_memory.py``'s.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from side_by_side import REPOSITORY, Report, Row, parser, run_program, shrink, words  # isort: skip
from random_models import SIZES, write_world

SAVERS: dict[str, dict[str, Any]] = {"small": {"lora": {"rank": 16}}}
"""Settings without which a size needs more than most machines have."""
ATTEMPTS = 3


def run(command: Sequence[str]) -> None:
    """Run a program, and again where it fails: Ray gives its own processes 30 s to start, which a machine that
    others use may exceed.
    """
    for attempt in range(ATTEMPTS):
        try:
            run_program(command)
        except SystemExit as error:
            if attempt == ATTEMPTS - 1:
                raise
            print(f"once more, as it failed: {str(error).splitlines()[-1]}", file=sys.stderr, flush=True)
        else:
            return


def measure(size: str, options: argparse.Namespace) -> list[Row]:
    """One row a role."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_world(
            folder,
            size,
            prompts=options.rows,
            length=options.prompt,
            device="cpu",
            num_rollout_workers=options.workers,
            batch_size=options.rows,
            total_steps=options.steps,
            save_every=options.steps,
            probes=0,
            generation={
                "prompt_length": options.prompt,
                "response_length": options.response,
                "shard_size": options.rows // 2,
            },
            ppo={"mini_batch_size": options.rows, "micro_batch_size": options.rows // 2, "epochs": 1},
            **SAVERS.get(size, {}),
        )
        run([sys.executable, str(REPOSITORY / "launch" / "ppo.py"), "--config", str(file)])
        content = json.loads((folder / "checkpoints" / "ppo" / "default" / "memory.json").read_text(encoding="utf-8"))
    return [
        {
            "model": ", ".join([size, *SAVERS.get(size, {})]),
            "role": role,
            "most in": found.get("phase", ""),
            "predicted MB": round(found["predicted"] / 1e6),
            "measured MB": round(found["measured"] / 1e6),
            "off": f"{found['predicted'] / found['measured'] - 1:+.0%}",
        }
        for role, found in content["roles"].items()
    ]


def main() -> None:
    """Measure every size."""
    options_of = parser(__doc__ and __doc__.splitlines()[0], repetitions=1)
    options_of.add_argument("--sizes", type=words, default=list(SIZES))
    options_of.add_argument("--workers", type=int, default=2, help="rollout workers; 0 has all roles in one process")
    options_of.add_argument("--rows", type=int, default=4, help="of a batch; half of them are a micro-batch")
    options_of.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    options_of.add_argument("--response", type=int, default=24, help="tokens of a response")
    options_of.add_argument("--steps", type=int, default=1)
    options = options_of.parse_args()
    shrink(options, sizes=["tiny"], workers=0, rows=2, prompt=4, response=4, steps=1)
    report = Report("memory_plan", options)
    shape = f"{options.rows} x ({options.prompt} + {options.response}) tokens, {options.steps} steps"
    for size in options.sizes:
        report.table(f"private host memory of one process: {size}, {shape}", measure(size, options))
    report.close()


if __name__ == "__main__":
    main()
