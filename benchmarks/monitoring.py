"""What watching a run costs it: the processor time of everything that only looks, against the time of its steps.

One PPO run of random tiny models on two Ray workers.  Each part that watches is timed where it is called: on the
driver's own thread, which holds the next step up, and on the writer's, which works beside it.  A worker's part, two
counters a call and one gauge a second, is timed by itself.  One step in the middle is traced.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from random_models import write_world
from side_by_side import Report, Row, parser, shrink

from rlhf_ray import app, rl_run
from rlhf_ray.config import PPOConfig, load
from rlhf_ray.health import Health
from rlhf_ray.live import RunView
from rlhf_ray.run import Run, read_metrics
from rlhf_ray.runtime.metrics import StepMetrics, WorkerMetrics
from rlhf_ray.types import Usage

spent: dict[str, list[float]] = defaultdict(list)
"""Seconds of every call of a part."""


def timed(owner: Any, name: str, part: str) -> None:
    """Have a function's processor time, of the thread that calls it, added to a part."""
    function: Callable[..., Any] = getattr(owner, name)

    @wraps(function)
    def measured(*arguments: Any, **options: Any) -> Any:
        start = time.thread_time()
        try:
            return function(*arguments, **options)
        finally:
            spent[part].append(time.thread_time() - start)

    setattr(owner, name, measured)


def watch_the_watchers() -> None:
    """Time what looks at a run."""
    timed(StepMetrics, "log", "driver: Prometheus")
    timed(RunView, "update", "driver: terminal")
    timed(Health, "see", "driver: doctor")
    timed(rl_run, "histograms", "driver: histograms")
    timed(Run, "_write_metrics", "writer: metrics.jsonl and TensorBoard")
    timed(Run, "_write_board", "writer: TensorBoard's histograms")
    timed(Run, "_write_samples", "writer: samples")


def train(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The metrics of a run whose steps are like the demo's."""
    settings = {
        "batch_size": options.rows,
        "total_steps": options.steps,
        "save_every": options.steps,
        "profile_step": options.steps // 2 + 1,
        "num_rollout_workers": options.workers,
        "generation": {"prompt_length": 24, "response_length": options.length},
        "ppo": {"epochs": 2, "mini_batch_size": options.rows // 4},
    }
    file = write_world(folder, "tiny", prompts=256, length=24, **settings)
    return read_metrics(app.train_ppo(load(PPOConfig, ["--config", str(file)])))


def per_call(calls: int = 2000) -> float:
    """Seconds of what a worker does after one call."""
    metrics = WorkerMetrics(run="benchmark", role="nobody", worker="nobody 0")
    used = Usage(tokens=1, seconds=1e-9)
    start = time.thread_time()
    for _ in range(calls):
        metrics.note(used)
    return (time.thread_time() - start) / calls


def main() -> None:
    """Measure a run, and print each part's share of its steps."""
    made = parser(__doc__, repetitions=1)
    made.add_argument("--workers", type=int, default=2, help="rollout workers; without any nothing goes to Prometheus")
    made.add_argument("--rows", type=int, default=128, help="rows of a step")
    made.add_argument("--length", type=int, default=24, help="tokens of a response")
    made.add_argument("--steps", type=int, default=20, help="steps of the run")
    options = made.parse_args()
    shrink(options, workers=0, rows=16, length=8, steps=3)
    report = Report("monitoring", options)
    watch_the_watchers()
    with tempfile.TemporaryDirectory() as folder:
        steps = train(Path(folder), options)
    step = statistics.median(step["time/step"] for step in steps)
    times = {part: statistics.median(seconds) for part, seconds in sorted(spent.items())}
    times["all"] = sum(times.values())
    rows: list[Row] = [
        {"part": part, "ms a step": 1000 * seconds, "% of a step": 100 * seconds / step}
        for part, seconds in times.items()
    ]
    for part, row in (("the traced step", options.steps // 2), ("the step after it", options.steps // 2 + 1)):
        seconds = steps[row]["time/step"]
        rows.append({"part": part, "ms a step": 1000 * seconds, "% of a step": 100 * seconds / step})
    rows.append({"part": "a worker: after one call", "ms a step": 1000 * per_call(), "% of a step": None})
    report.table(f"medians of {len(steps)} steps of {options.rows} rows, {step:.2f} s each", rows)
    report.close()


if __name__ == "__main__":
    main()
