"""Where the time before the first step goes: every script's --help, and PPO's phases with and without Ray.

PPO runs one small step of random tiny models, in a process of its own each time; the phases are those that the run
logs itself, on the driver's clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from random_models import write_world
from side_by_side import REPOSITORY, Report, Row, numbers, parser, run_program, seconds, shrink, spread

from rlhf_ray.run import read_metrics

PREFIX = "time/startup_"


def one_step(folder: Path) -> Path:
    """The configuration of one short step, with all that it needs."""
    generation = {"prompt_length": 8, "response_length": 8, "shard_size": 4}
    ppo = {"epochs": 1, "mini_batch_size": 8, "micro_batch_size": 8}
    settings = {"batch_size": 8, "total_steps": 1, "generation": generation, "ppo": ppo}
    return write_world(folder, "tiny", prompts=16, length=8, **settings)


def help_seconds(options: argparse.Namespace) -> list[Row]:
    """Seconds of --help of every script."""
    rows = []
    for script in sorted((REPOSITORY / "launch").glob("*.py")):
        command = [sys.executable, str(script), "--help"]
        times = [seconds(lambda command=command: run_program(command)) for _ in range(options.repetitions)]
        found = spread(times)
        rows.append({"script": script.name, "seconds": found.median, "lowest": found.low, "highest": found.high})
    return rows


def ppo_phases(options: argparse.Namespace, config: Path) -> list[Row]:
    """Median seconds of PPO's phases, a row a number of rollout workers; None where a run has no such phase."""
    phases: dict[int, dict[str, float]] = {}
    for workers in options.workers:
        runs = []
        for number in range(options.repetitions):
            name = f"{workers}-{number}"
            command = [sys.executable, str(REPOSITORY / "launch" / "ppo.py"), "--config", str(config)]
            run_program([*command, "--run", name, "--num-rollout-workers", str(workers)])
            (step,) = read_metrics(config.parent / "checkpoints" / "ppo" / name)
            runs.append({key.removeprefix(PREFIX): step[key] for key in step if key.startswith(PREFIX)})
        phases[workers] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        phases[workers]["all"] = statistics.median(sum(run.values()) for run in runs)
    names = dict.fromkeys(name for found in phases.values() for name in found if name != "all")
    return [
        {"rollout workers": workers, **{name: found.get(name) for name in [*names, "all"]}}
        for workers, found in phases.items()
    ]


def main() -> None:
    """Measure and tell."""
    made = parser(__doc__)
    made.add_argument("--workers", type=numbers, default=[0, 2], help="numbers of rollout workers, with commas between")
    options = made.parse_args()
    shrink(options, workers=[0])
    report = Report("startup", options)
    report.table("--help", help_seconds(options))
    with tempfile.TemporaryDirectory() as folder:
        report.table("seconds to the end of the first PPO step", ppo_phases(options, one_step(Path(folder))))
    report.close()


if __name__ == "__main__":
    main()
