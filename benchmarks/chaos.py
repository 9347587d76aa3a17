"""PPO on two machines of which one random part is killed every few seconds, held against a run that is left alone.

    python benchmarks/chaos.py --minutes 5 --json chaos.json

    python benchmarks/chaos.py --minutes 2 --num-learners 2 --stop-learner --timeout 45 --learner-every 15 --steps 60

Parts are rollout, reward, reference and learner workers (kill -9, now and then SIGSTOP) and the second machine (kill -9
of its raylet; another one joins later).  A learner is one worker or one of several ranks, which all begin anew when one
of them is hit; it is stopped only when that is asked for, as it counts as hung after ``--timeout`` alone.  Half of the
workers are hit in the middle of a call, half at any time.  Drawn from are the parts that were hit least often, of those
that may be hit.  Both runs are ``launch/ppo.py`` with random models on a cluster of this script's own, and must end
with the same metrics (but for time/ and perf/), TensorBoard events, samples and files of the last checkpoint; otherwise
the exit code is 1.

A replacement works again once its process is seen in the middle of a call.  Values lie in the machines' object stores,
however small they are, and a machine is taken for dead after 3 s without an answer.

Left out on purpose: the deaths of driver and head, after which the same command goes on (docs/RELIABILITY.md).
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import side_by_side  # noqa: F401  puts the repository on the path

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0"}
from random_models import write_world
from ray.cluster_utils import Cluster
from side_by_side import REPOSITORY, Report, Row, numbers, parser, shrink
from striking import MACHINE, PARTS, Rhythm, Strike, Striker

from tests.run_ends import end_of

HEAD = {
    "num_cpus": 2,
    "include_dashboard": False,
    "_system_config": {
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 1000,
        "health_check_failure_threshold": 3,
        "max_direct_call_object_size": 1000,
    },
}
PATIENCE_SECONDS = 600.0
"""That a run may take when nobody disturbs it, or any more."""


def world(folder: Path, options: argparse.Namespace) -> Path:
    """The configuration of both runs, with all that they need."""
    batch = options.batch
    settings = {
        "num_rollout_workers": options.workers,
        "num_learners": options.num_learners,
        "labels": {"rollout": ["machine=second"]},
        "batch_size": batch,
        "total_steps": options.steps,
        "max_staleness": 1,
        "save_every": options.save_every,
        "timeout": options.timeout,
        "call_timeout": options.call_timeout,
        "max_restarts": 1000,
        "kl": {"adaptive": True, "target": 0.5, "horizon": 2000},
        "generation": {
            "prompt_length": options.prompt,
            "response_length": options.response,
            "shard_size": batch // 4,
        },
        "ppo": {"epochs": 2, "mini_batch_size": batch // 2, "micro_batch_size": batch // 4, "lr": 1e-4},
    }
    return write_world(folder, "tiny", prompts=4 * batch, length=options.prompt, **settings)


@contextmanager
def running(config: Path, name: str, cluster: Cluster, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of the runs, what it says in a file; ends the program with the last lines of that unless it ends well."""
    line = [sys.executable, "launch/ppo.py", "--config", str(config), "--run", name, *words]
    log = config.with_name(f"{name}.log")
    with log.open("wb") as file:
        environment = {**os.environ, "RAY_ADDRESS": cluster.address}
        run = subprocess.Popen(line, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield run
        run.wait(PATIENCE_SECONDS)
    finally:
        run.kill()
    if run.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
        raise SystemExit("\n".join([*said, f"error: the {name} run ended with exit code {run.returncode}"]))


def left_alone(options: argparse.Namespace, config: Path, cluster: Cluster) -> float:
    """Seconds of the run that nobody disturbs."""
    begun = time.monotonic()
    with running(config, "undisturbed", cluster, *(["--num-rollout-workers", "0"] if options.in_process else [])):
        pass
    return time.monotonic() - begun


def disturbed(options: argparse.Namespace, config: Path, cluster: Cluster) -> tuple[float, float, list[Strike]]:
    """Seconds of the run that is disturbed, how long it was, and by what."""
    rhythm = Rhythm(
        pause=tuple(options.pause),
        learner=options.learner_every,
        stops_learner=options.stop_learner,
        machine=options.raylet_every,
        down=options.raylet_down,
    )
    begun = time.monotonic()
    with running(config, "disturbed", cluster) as run:
        striker = Striker(rhythm, cluster, config.parent / "checkpoints/ppo/disturbed", seed=options.seed)
        lasted = striker.strike_while(lambda: run.poll() is None, seconds=60 * options.minutes)
    striker.stop()
    return time.monotonic() - begun, lasted, striker.strikes


def told(strikes: list[Strike]) -> list[Row]:
    """A row a part."""
    rows: list[Row] = []
    for part in PARTS:
        hits = [strike for strike in strikes if strike.part == part]
        back = [strike.seconds for strike in hits if strike.seconds is not None]
        rows.append(
            {
                "part": f"{part} of the second machine" if part == MACHINE else part,
                "kill -9": sum(strike.how == "SIGKILL" for strike in hits),
                "SIGSTOP": sum(strike.how == "SIGSTOP" for strike in hits),
                "in a call": sum(strike.method is not None for strike in hits),
                "workers lost": sum(strike.lost for strike in hits),
                "replaced": sum(strike.lost - strike.missing for strike in hits),
                "seconds, median": statistics.median(back) if back else None,
                "largest": max(back, default=None),
                "steps done again": sum(strike.steps for strike in hits),
            }
        )
    return rows


def compare(report: Report, folder: Path, steps: int) -> list[str]:
    """What of the two runs' ends is not the same; says what was compared."""
    one, other = (end_of(folder / "checkpoints/ppo" / name, steps) for name in ("undisturbed", "disturbed"))
    values = sum(map(len, one["metrics"]))
    rows = [
        {"what": "values of metrics.jsonl", "how many": values, "equal": one["metrics"] == other["metrics"]},
        {"what": "TensorBoard series", "how many": len(one["events"]), "equal": one["events"] == other["events"]},
        {"what": "files of samples", "how many": len(one["samples"]), "equal": one["samples"] == other["samples"]},
    ]
    for name in one["sha256"] | other["sha256"]:
        digests = [end["sha256"].get(name, "none") for end in (one, other)]
        rows.append({"what": f"{name}, SHA-256 {digests[0][:16]}", "how many": 1, "equal": digests[0] == digests[1]})
    report.table("the ends of both runs", rows)
    return [str(row["what"]) for row in rows if not row["equal"]]


def read_options() -> argparse.Namespace:
    """The command line."""
    options_of = parser(__doc__ and __doc__.splitlines()[0])
    options_of.add_argument(
        "--minutes", type=float, default=5.0, help="of chaos, or until every part was hit; the run's end is left alone"
    )
    options_of.add_argument("--seed", type=int, default=0, help="of who is hit and when")
    options_of.add_argument("--pause", type=numbers, default=[4, 12], help="seconds between two hits, evenly drawn")
    options_of.add_argument("--learner-every", type=float, default=40.0, help="seconds between two of the learner")
    options_of.add_argument("--num-learners", type=int, default=1, help="ranks of the learner")
    options_of.add_argument("--stop-learner", action="store_true", help="every other hit on the learner is a SIGSTOP")
    options_of.add_argument("--timeout", type=float, default=120.0, help="seconds of a learner's call, and of a start")
    options_of.add_argument("--raylet-every", type=float, default=70.0, help="seconds between two of the machine")
    options_of.add_argument("--raylet-down", type=float, default=12.0, help="seconds before another machine joins")
    options_of.add_argument("--call-timeout", type=float, default=10.0, help="seconds after which one counts as hung")
    options_of.add_argument("--steps", type=int, default=120)
    options_of.add_argument("--save-every", type=int, default=4)
    options_of.add_argument("--workers", type=int, default=2, help="rollout workers")
    options_of.add_argument("--batch", type=int, default=16, help="rows of a step")
    options_of.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    options_of.add_argument("--response", type=int, default=24, help="tokens of a response")
    options_of.add_argument("--in-process", action="store_true", help="leave the other run without Ray: quicker")
    options_of.add_argument("--folder", type=Path, help="where both runs are kept")
    options = options_of.parse_args()
    shrink(
        options,
        minutes=0.1,
        pause=[0, 2],
        learner_every=60.0,
        raylet_every=60.0,
        raylet_down=4.0,
        call_timeout=4.0,
        steps=10,
        workers=1,
        batch=8,
        prompt=8,
        response=12,
        in_process=True,
    )
    options.even_if_busy = True  # seconds are said here, and nothing rests on them
    return options


def main() -> None:
    """Both runs, and what became of them."""
    options = read_options()
    report = Report("chaos", options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        config = world(folder, options)
        cluster = Cluster(initialize_head=True, head_node_args=HEAD)
        try:
            Striker.join(cluster)
            alone = left_alone(options, config, cluster)
            seconds, lasted, strikes = disturbed(options, config, cluster)
        finally:
            cluster.shutdown()
        low, high = options.pause
        report.table(
            f"{len(strikes)} hits in {lasted:.0f} s, one every {low}-{high} s, the learner at most every "
            f"{options.learner_every:g} s, the machine every {options.raylet_every:g} s; seed {options.seed}",
            told(strikes),
        )
        report.content["hits"] = [asdict(strike) | {"at": strike.at - strikes[0].at} for strike in strikes]
        again = sum(strike.steps for strike in strikes)
        timed: dict[str, Any] = {"steps": options.steps, "left alone": alone, "disturbed": seconds}
        report.table("seconds of the whole runs", [{**timed, "times": seconds / alone, "steps done again": again}])
        wrong = compare(report, folder, options.steps)
    report.close()
    if wrong:
        raise SystemExit(f"error: not the same: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
