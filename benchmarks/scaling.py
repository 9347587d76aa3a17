"""How generation grows: with rollout workers, with rows, and with their length.

    python benchmarks/scaling.py --size mini_xl --json scaling.json

Workers are real Ray actors with one thread each, called as PPO calls them, and nothing else computes meanwhile.  Rows
and lengths are timed in this process; the exponent e of time ~ n^e is fitted by least squares over all points, and over
the last two.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from side_by_side import Report, Row, interleave, numbers, parser, ratio, shrink, spread  # isort: skip
import numpy as np
from machine import DTYPES, device
from random_models import SIZES, random_engine, random_policy, random_prompts, write_models, write_prompts

from rlhf_ray.config import PPO, Generation, PPOConfig, RewardSource
from rlhf_ray.crews import worker_arguments
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.failures import Deaths
from rlhf_ray.generation import Sampling, row_uniforms
from rlhf_ray.ppo_inputs import read_inputs
from rlhf_ray.roles import gather
from rlhf_ray.runtime.all_crews import stop, wait_until_built
from rlhf_ray.runtime.cluster import connect
from rlhf_ray.runtime.crew import RayCrew
from rlhf_ray.runtime.placement import Request, Seat
from rlhf_ray.types import Done
from rlhf_ray.workers.groups import GeneratorGroup
from rlhf_ray.workers.rollout import RolloutWorker
from rlhf_ray.workers.weights import export_weights


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """e of time ~ n^e through the points (n, seconds)."""
    slope, _ = np.polyfit([math.log(n) for n, _ in points], [math.log(seconds) for _, seconds in points], 1)
    return float(slope)


def in_process(options: argparse.Namespace, *, rows: int, prompt: int, new: int) -> Callable[[], object]:
    """A call that generates rows of one length."""
    engine = random_engine(options.size, max_rows=options.slots, dtype=DTYPES[options.dtype])
    prompts = random_prompts(options.size, count=rows, length=prompt)
    uniforms = np.stack([row_uniforms(0, 0, row, new) for row in range(rows)])
    return partial(engine.generate, prompts, uniforms, Sampling(max_new_tokens=new))


def measure_growth(report: Report, name: str, calls: dict[int, Callable[[], object]], tokens: dict[int, int]) -> None:
    """Time the calls by size, and fit how they grow."""
    times = interleave({str(n): call for n, call in calls.items()}, repetitions=report.options.repetitions)
    points = [(n, statistics.median(times[str(n)])) for n in calls]
    report.table(
        f"{name}: time grows with exponent {exponent(points):.2f}, at the end {exponent(points[-2:]):.2f}",
        [{name: n, "seconds": seconds, "new tokens/s": tokens[n] / seconds} for n, seconds in points],
    )


def measure_rows(report: Report) -> None:
    """More rows of one length."""
    options = report.options
    calls = {n: in_process(options, rows=n, prompt=options.prompt, new=options.new) for n in options.rows}
    measure_growth(report, "rows", calls, {n: n * options.new for n in calls})


def measure_lengths(report: Report) -> None:
    """Longer rows, prompt and response together."""
    options, prompt = report.options, report.options.prompt // 2
    calls = {n: in_process(options, rows=options.slots, prompt=prompt, new=n - prompt) for n in options.lengths}
    measure_growth(report, "length", calls, {n: options.slots * (n - prompt) for n in calls})


def ppo_config(folder: Path, options: argparse.Namespace) -> PPOConfig:
    """A run in a folder of ``write_models``."""
    return PPOConfig(
        policy=folder / "policy",
        rewards=[RewardSource(source=str(folder / "reward"))],
        prompts=folder / "prompts.txt",
        template="plain",
        batch_size=options.batch,
        generation=Generation(
            prompt_length=options.prompt,
            response_length=options.new,
            shard_size=options.shard,
            dtype=options.dtype,
        ),
        ppo=PPO(mini_batch_size=options.batch),
    )


def shares(seats: Sequence[Seat]) -> list[dict[str, int]]:
    """Cores of each worker."""
    return [{"share": seat.cores} for seat in seats]


def generators(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Callable[[], object]], list[RayCrew]]:
    """Crews of every size, and for each a call that generates one batch; they take turns."""
    config = ppo_config(folder, options)
    inputs = read_inputs(config)
    arguments = worker_arguments(config, inputs)[RolloutWorker]
    weights = Done(export_weights(random_policy(options.size), 0, DTYPES[options.dtype]))
    batch = PromptStream(len(inputs.prompts), config.batch_size, seed=0).take(0)
    cuda = device().type == "cuda"
    gpus = config.rollout_gpus if cuda else 0.0
    seats = connect(need=[Request(role=str(n), count=n, cpus=config.rollout_cpus, gpus=gpus) for n in options.workers])
    calls: dict[str, Callable[[], object]] = {}
    crews = []
    for size in options.workers:
        crew = RayCrew(
            RolloutWorker,
            arguments,
            role="rollout",
            seats=seats[str(size)],
            own=partial(shares, seats[str(size)]),
            deaths=Deaths(0, 60.0, print),
            timeout=config.timeout,
        )
        group = GeneratorGroup(crew, shard_size=options.shard)
        group.update_weights(weights)
        calls[str(size)] = lambda group=group: gather(group.generate(batch, 0))  # type: ignore[misc]
        crews.append(crew)
    wait_until_built(crews)
    return calls, crews


def measure_workers(report: Report) -> None:
    """More workers on the same batch."""
    options = report.options
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, options.size)
        write_prompts(folder / "prompts.txt", options.size, count=2 * options.batch, length=options.prompt)
        calls, crews = generators(folder, options)
        try:
            times = interleave(calls, repetitions=options.repetitions)
        finally:
            stop(crews)
    first = times[str(options.workers[0])]
    rows: list[Row] = [
        {
            "workers": int(size),
            "new tokens/s": spread([options.batch * options.new / second for second in found]).median,
            f"faster than {options.workers[0]}": ratio(found, first),
        }
        for size, found in times.items()
    ]
    report.table(f"rollout workers of one thread, {options.batch} rows in shards of {options.shard}", rows)


def main() -> None:
    """Measure the parts that were asked for."""
    options_of = parser(__doc__ and __doc__.splitlines()[0])
    options_of.add_argument("--size", choices=SIZES, default="mini_xl")
    options_of.add_argument("--dtype", choices=DTYPES, default="float32")
    options_of.add_argument("--workers", type=numbers, default=[1, 2], help="rollout workers; 0 leaves them out")
    options_of.add_argument("--batch", type=int, default=128, help="rows that the workers share")
    options_of.add_argument("--shard", type=int, default=32, help="rows of one call of a worker")
    options_of.add_argument("--rows", type=numbers, default=[8, 16, 32, 64, 128, 256, 512])
    options_of.add_argument("--lengths", type=numbers, default=[64, 128, 256, 512, 1024], help="of whole rows")
    options_of.add_argument("--slots", type=int, default=64, help="rows generated at once in this process")
    options_of.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    options_of.add_argument("--new", type=int, default=64, help="tokens of a response")
    options = options_of.parse_args()
    tiny = {"size": "tiny", "batch": 8, "shard": 4, "rows": [2, 4], "lengths": [16, 32], "slots": 4}
    shrink(options, **tiny, prompt=8, new=8)
    report = Report("scaling", options)
    if options.workers != [0]:
        measure_workers(report)
    measure_rows(report)
    measure_lengths(report)
    report.close()


if __name__ == "__main__":
    main()
