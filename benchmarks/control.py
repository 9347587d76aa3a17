"""How far one controller goes: what the driver of PPO costs a step, by rollout workers, shards, rows and their length.

    python benchmarks/control.py --json control.json

The algorithm, its run, groups, crews, dispatchers and Ray actors are the real ones.  Only the workers are stubs: they
sleep as long as a real one of ``--tokens-per-second`` would compute, and answer in its shapes.  Reward, reference and
learner are as fast as it takes to keep up: each has an opinion on a batch in half of the time that generating it
takes, and the update takes as long as generation; all stubs end together, which is the worst case.

First stubs don't sleep, and rows, shards and lengths change.  Then the workers grow, and the rows with them.  The model
seconds = a + b x shards + c x tokens, fitted to the first, is held against the second, and goes on from there on paper.

Left out on purpose: the bytes of the weights, which the driver never holds.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from side_by_side import Report, numbers, parser, shrink  # isort: skip
import numpy as np
import torch.utils.tensorboard  # noqa: F401  a run would import it in its first step
from random_models import VOCABULARIES, made_up_tokenizer
from scaling import exponent
from stub_workers import Stub, importable

from rlhf_ray.algorithms.ppo import train
from rlhf_ray.config import PPO, Generation, PPOConfig
from rlhf_ray.data.prompt_set import PromptSet
from rlhf_ray.failures import Deaths
from rlhf_ray.rl_run import RLRun
from rlhf_ray.roles import Roles
from rlhf_ray.run import Run
from rlhf_ray.runtime.all_crews import stop, wait_until_built
from rlhf_ray.runtime.cluster import connect
from rlhf_ray.runtime.crew import RayCrew
from rlhf_ray.runtime.placement import Request
from rlhf_ray.workers.groups import GeneratorGroup, LearnerGroup, ReferenceGroup, RewardGroup

BUDGET = 0.02
"""Share of a step that the controller may take."""
BYTES = 30
"""That the driver gathers a token: a rollout 14, the reference's opinion 4, the learner's 12."""


def daemons() -> list[Path]:
    """What the system says of Ray's daemons here, which are this process's children: control store, raylet, ..."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            found += [stat] if int(cells(stat)[1]) == os.getpid() else []
    return found


def cells(stat: Path) -> list[str]:
    """The cells of a process's line, from its state on."""
    return stat.read_text(encoding="utf-8").rpartition(")")[2].split()


class TimedRun(RLRun):
    """Notes at the end of every step the clock, and the CPU seconds of this process and of Ray's daemons."""

    marks: list[tuple[float, float, float]]
    daemons: list[Path]

    def end_step(self, *arguments: Any) -> None:
        super().end_step(*arguments)
        clock, own = time.perf_counter(), time.process_time()
        ticks = sum(int(cell) for stat in self.daemons for cell in cells(stat)[11:13])
        self.marks.append((clock, own, ticks / os.sysconf("SC_CLK_TCK")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What a step of some size costs, in medians over steps."""

    rows: int
    shard: int
    length: int
    """Tokens of a row."""
    wall: float
    controller: float
    """CPU seconds of the driver's process, all its threads."""
    daemons: float
    """CPU seconds of Ray's daemons beside it."""

    @property
    def terms(self) -> list[float]:
        """What the model adds up: 1, shards, tokens."""
        return [1.0, math.ceil(self.rows / self.shard), self.rows * self.length]


def ideal(workers: int, rows: int, shard: int, row_seconds: float) -> float:
    """Seconds of a step in which nobody waits for the controller: generation, the last wave's judging, the update."""
    waves, last = divmod(math.ceil(rows / shard) - 1, workers)
    return row_seconds * (shard * (waves + 1) + shard * (last + 1) / (2 * workers) + rows / workers)


@contextmanager
def crews(
    options: argparse.Namespace, workers: int, *, new: int, row_seconds: float = 0.0
) -> Iterator[dict[str, RayCrew]]:
    """Stubs of all four roles: so many rollout workers, and one of each other, which keeps up with them."""
    pace = dict.fromkeys(("learner", "reward", "reference"), row_seconds / (2 * workers)) | {"rollout": row_seconds}
    counts = {role: workers if role == "rollout" else 1 for role in pace}
    seats = connect(need=[Request(role=role, count=count, cpus=options.share) for role, count in counts.items()])
    built = {
        role: RayCrew(
            Stub,
            {"prompt": options.prompt, "new": new, "row_seconds": seconds},
            role=role,
            seats=seats[role],
            deaths=Deaths(0, 60.0, print),
            timeout=600.0,
            together=role == "learner",
        )
        for role, seconds in pace.items()
    }
    try:
        wait_until_built(list(built.values()))
        yield built
    finally:
        stop(list(built.values()))


def measure(options: argparse.Namespace, built: dict[str, RayCrew], *, rows: int, shard: int, new: int) -> Point:
    """Steps of PPO; the first, which warms up, does not count."""
    steps = options.repetitions + 1
    config = PPOConfig(
        batch_size=rows,
        total_steps=steps,
        save_every=steps,
        generation=Generation(prompt_length=options.prompt, response_length=new, shard_size=shard),
        ppo=PPO(mini_batch_size=rows),
    )
    learner = LearnerGroup(built["learner"])
    roles = Roles(
        generator=GeneratorGroup(built["rollout"], shard_size=shard),
        reward=RewardGroup(built["reward"]),
        reference=ReferenceGroup(built["reference"]),
        learner=learner,
    )
    prompts = PromptSet(rows=((),) * rows, token_ids=((),) * rows, dropped=0, cut=0)
    with tempfile.TemporaryDirectory() as folder, Run.open(folder, {}, resume=False) as run:
        timed = TimedRun(run, config, roles, learner, made_up_tokenizer(VOCABULARIES["tiny"]), prompts)
        timed.marks, timed.daemons = [], daemons()
        with run.written(), redirect_stdout(sys.stderr):
            train(config, roles, timed)
        timed.store.close()
    differences = np.diff(np.array(timed.marks), axis=0)  # (repetitions, 3)
    wall, controller, beside = np.median(differences, axis=0).tolist()
    return Point(rows=rows, shard=shard, length=options.prompt + new, wall=wall, controller=controller, daemons=beside)


def measure_workers(report: Report) -> dict[int, Point]:
    """More workers, and rows for each."""
    options = report.options
    row_seconds = options.new / options.tokens_per_second
    points = {}
    for n in options.workers:
        with crews(options, n, new=options.new, row_seconds=row_seconds) as built:
            points[n] = measure(options, built, rows=n * options.each, shard=options.shard, new=options.new)
    rows = []
    for n, point in points.items():
        least = ideal(n, point.rows, point.shard, row_seconds)
        rows.append(
            {
                "workers": n,
                "rows": point.rows,
                "shards": int(point.terms[1]),
                "s a step": point.wall,
                "of these nobody computes": point.wall - least,
                "controller, CPU s": point.controller,
                "of the step, %": 100 * point.controller / point.wall,
                "Ray's daemons, CPU s": point.daemons,
                "tokens/s a worker at which it is 2 %": options.tokens_per_second * BUDGET * least / point.controller,
            }
        )
    report.table(f"workers of {options.tokens_per_second:,.0f} tokens/s, {options.each} rows each", rows)
    return points


def measure_sizes(report: Report) -> list[Point]:
    """More rows, shards of other sizes and longer responses, with two workers that don't sleep."""
    options = report.options
    middle = options.rows[len(options.rows) // 2]
    sizes = [(rows, options.shard, options.new) for rows in options.rows]
    sizes += [(middle, options.shard // 4, options.new), (middle, 4 * options.shard, options.new)]
    sizes += [(middle, options.shard, options.long)]
    points = []
    for new in sorted({options.new, options.long}):
        with crews(options, 2, new=new) as built:
            measure(options, built, rows=options.rows[0], shard=options.shard, new=new)  # what is done but once
            for rows, shard, length in sizes:
                if length == new:
                    points.append(measure(options, built, rows=rows, shard=shard, new=new))
    line = [(point.rows, point.controller) for point in points[: len(options.rows)]]
    report.table(
        f"controller by size: CPU seconds grow with rows^{exponent(line):.2f}, at the end {exponent(line[-2:]):.2f}",
        [
            {
                "rows": point.rows,
                "shards of": point.shard,
                "tokens a row": point.length,
                "controller, CPU s": point.controller,
                "ms a shard": 1e3 * point.controller / point.terms[1],
                "Ray's daemons, CPU s": point.daemons,
                "s a step": point.wall,
            }
            for point in points
        ],
    )
    return points


def extrapolate(report: Report, points: list[Point], measured: dict[int, Point]) -> None:
    """Fit the model to the sizes, compare it with the workers, and go where no workers are."""
    options = report.options
    terms = np.array([point.terms for point in points])
    seconds = np.array([point.controller for point in points])
    model, *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(points)), rcond=None)  # relative errors
    rows = []
    for n in sorted({*measured, *options.paper}):
        for new in sorted({options.new, options.long}):
            size = Point(
                rows=n * options.each,
                shard=options.shard,
                length=options.prompt + new,
                wall=ideal(n, n * options.each, options.shard, new / options.tokens_per_second),
                controller=math.nan,
                daemons=math.nan,
            )
            said = float(model @ size.terms)
            found = measured[n].controller if n in measured and new == options.new else None
            rows.append(
                {
                    "workers": n,
                    "tokens a row": size.length,
                    "s a step": size.wall,
                    "controller by the model, CPU s": said,
                    "measured": found,
                    "of the step, %": 100 * said / size.wall,
                    "gathered, MB": size.terms[2] * BYTES / 1e6,
                    "shards/s": size.terms[1] / size.wall,
                }
            )
    a, b, c = model * (1e3, 1e3, 1e9)
    report.table(f"on paper: {a:.1f} ms a step + {b:.2f} ms a shard + {c:.0f} ns a token", rows)


def main() -> None:
    """Measure, fit, extrapolate."""
    options_of = parser(__doc__ and __doc__.splitlines()[0], repetitions=2)
    options_of.add_argument("--workers", type=numbers, default=[1, 8, 64], help="rollout workers, all of them actors")
    options_of.add_argument("--paper", type=numbers, default=[256, 1024, 4096], help="rollout workers of the model")
    options_of.add_argument("--tokens-per-second", type=float, default=850.0, help="of one rollout worker")
    options_of.add_argument("--each", type=int, default=64, help="rows of a step for each worker")
    options_of.add_argument("--shard", type=int, default=64, help="rows of one call of a worker")
    options_of.add_argument("--rows", type=numbers, default=[256, 512, 1024, 2048, 4096, 8192])
    options_of.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    options_of.add_argument("--new", type=int, default=128, help="tokens of a response")
    options_of.add_argument("--long", type=int, default=512, help="tokens of a longer response")
    options_of.add_argument("--share", type=float, default=0.01, help="CPU share of an actor, to Ray")
    options = options_of.parse_args()
    shrink(options, workers=[1], each=8, shard=4, rows=[8, 16], prompt=4, new=4, long=4)
    report = Report("control", options)
    importable()
    extrapolate(report, measure_sizes(report), measure_workers(report))
    report.close()


if __name__ == "__main__":
    main()
