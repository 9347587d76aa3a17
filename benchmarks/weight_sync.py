"""Publishing weights: from the moment that the learner is asked until every rollout worker holds them.

    python benchmarks/weight_sync.py --json weight_sync.json

Sender and receivers are real Ray actors on this machine, called through the crews that PPO calls.  The other side is
the obvious way: a state_dict of torch tensors as one actor's return value and the others' argument, unchecked.  What
does not fit into memory is left out, and said.  The steps by themselves are timed in this process.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import Report, Row, interleave, numbers, parser, ratio, shrink, words  # isort: skip
import torch
from machine import DTYPES
from torch import Tensor

from rlhf_ray.failures import Deaths
from rlhf_ray.generation.native_model import NativeModel, native_problem
from rlhf_ray.models import GPT2, preset
from rlhf_ray.models.flat import flat_weights, load_flat_weights
from rlhf_ray.runtime.all_crews import stop, wait_until_built
from rlhf_ray.runtime.cluster import connect
from rlhf_ray.runtime.crew import RayCrew
from rlhf_ray.runtime.placement import Request
from rlhf_ray.types import Usage, Weights
from rlhf_ray.workers.groups import Given
from rlhf_ray.workers.weights import digest, export_weights, import_weights

SIZES = {"tiny": 4103, "mini_xl": 50264, "medium": 50264}
"""Models and their vocabularies."""
ACTOR_BYTES = 300e6
"""Of an actor before it has a model."""


class Sender:
    """A learner that has nothing but float32 weights."""

    def __init__(self, size: str, threads: int) -> None:
        self.policy = random_policy(size)
        self.threads = threads
        self.times: list[float] = []

    def weights(self, version: int, dtype: torch.dtype) -> Weights:
        """Ours."""
        start = time.perf_counter()
        weights = export_weights(self.policy, version, dtype, threads=self.threads)
        self.times = [start, time.perf_counter()]
        return weights

    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The obvious way."""
        carrier = torch.int16 if dtype == torch.bfloat16 else dtype  # tensors travel as numpy arrays
        return {name: x.to(dtype).view(carrier) for name, x in self.policy.state_dict().items()}

    def stamps(self) -> list[float]:
        """Monotonic seconds before and after the last export; they are the same clock in all processes."""
        return self.times

    def usage(self) -> Usage:
        """Not counted."""
        return Usage()


class Receiver:
    """A rollout worker that has nothing but weights."""

    def __init__(self, size: str, dtype: torch.dtype, threads: int) -> None:
        self.policy, self.dtype = empty_policy(size, dtype), dtype
        self.threads = threads
        self.times: list[float] = []

    def update_weights(self, weights: Weights) -> None:
        """Ours."""
        start = time.perf_counter()
        import_weights(self.policy, weights, threads=self.threads)
        self.times = [start, time.perf_counter()]

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The obvious way."""
        self.policy.load_state_dict({name: x.view(self.dtype) for name, x in state.items()})

    def stamps(self) -> tuple[int, list[float]]:
        """Who this is, and monotonic seconds before and after the last weights were taken over."""
        return os.getpid(), self.times

    def usage(self) -> Usage:
        """Not counted."""
        return Usage()


def empty_policy(size: str, dtype: torch.dtype) -> GPT2:
    """A policy whose values are yet to come."""
    with torch.device("meta"):
        policy = GPT2(preset(size, SIZES[size]), device="meta", dtype=dtype)
    return policy.to_empty(device="cpu").requires_grad_(False)


def random_policy(size: str) -> GPT2:
    """A float32 policy of values that mean nothing."""
    policy = empty_policy(size, torch.float32)
    for parameter in policy.parameters():
        parameter.uniform_(-0.1, 0.1)
    return policy


class Publication:
    """A sender and its receivers."""

    def __init__(self, size: str, dtype: torch.dtype, receivers: int, threads: int) -> None:
        self.dtype, self.version = dtype, 0
        self.seconds: dict[str, list[float]] = {"export": [], "hand over": [], "take over": []}
        roles = {"sender": 1, "receiver": receivers}
        seats = connect(need=[Request(role=role, count=count, cpus=0.1, gpus=0.0) for role, count in roles.items()])
        share = max(1, threads // receivers)
        self.crews = [
            RayCrew(worker, arguments, role=role, seats=seats[role], deaths=Deaths(0, 60.0, print), timeout=300.0)
            for role, worker, arguments in (
                ("sender", Sender, {"size": size, "threads": threads}),
                ("receiver", Receiver, {"size": size, "dtype": dtype, "threads": share}),
            )
        ]
        wait_until_built(self.crews)

    def flat(self) -> None:
        """Publish our way, noting when each step began."""
        self.version += 1
        found = self._publish("update_weights", "weights", self.version, self.dtype)
        begun, exported = self.crews[0].call("stamps").result()
        self.seconds["export"].append(exported - begun)
        self.seconds["hand over"].append(min(start for start, _ in found) - exported)
        self.seconds["take over"].append(max(end - start for start, end in found))

    def tensors(self) -> None:
        """Publish the obvious way."""
        self._publish("load_state", "state_dict", self.dtype)

    def _publish(self, take: str, give: str, *arguments: Any) -> list[list[float]]:
        """Ask the sender, and wait until every receiver holds what it gave; their stamps."""
        sender, receivers = self.crews
        given = Given(take, sender.call(give, *arguments))
        answers = [receivers.call("stamps", given=given) for _ in range(receivers.size)]
        who, found = zip(*(answer.result() for answer in answers), strict=True)
        assert len(set(who)) == receivers.size, "one receiver was asked twice"
        return list(found)


def needed_bytes(parameters: int, dtype: torch.dtype, receivers: int) -> float:
    """Memory at the worst moment: models, the sender's buffer, two versions in the store, and copies of tensors."""
    one = parameters * dtype.itemsize
    return 4 * parameters + 3 * one + receivers * 2 * one + (receivers + 2) * ACTOR_BYTES


def free_bytes() -> float:
    """Memory that programs can have now; without limit where the system does not say."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return min((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), default=math.inf)


def publication_row(options: argparse.Namespace, size: str, dtype: str, receivers: int) -> Row:
    """Both ways, in turn."""
    parameters = sum(p.numel() for p in empty_policy(size, DTYPES[dtype]).parameters())
    about = {"model": size, "dtype": dtype, "MB": parameters * DTYPES[dtype].itemsize / 1e6, "workers": receivers}
    publication = Publication(size, DTYPES[dtype], receivers, options.threads)
    sides: dict[str, Callable[[], object]] = {"ours": publication.flat, "tensors": publication.tensors}
    try:
        times = interleave(sides, repetitions=options.repetitions)
    finally:
        stop(publication.crews)
    steps = {step: statistics.median(found[1:]) for step, found in publication.seconds.items()}
    whole = {f"{name}, whole": statistics.median(found) for name, found in times.items()}
    return {**about, **steps, **whole, "ratio": ratio(times["ours"], times["tensors"])}


def measure_publication(report: Report) -> None:
    """Every size, type and number of receivers that fits."""
    options = report.options
    for size in options.sizes:
        parameters = sum(p.numel() for p in empty_policy(size, torch.float32).parameters())
        for dtype in options.dtypes:
            rows = []
            for receivers in options.workers:
                need, free = needed_bytes(parameters, DTYPES[dtype], receivers), free_bytes()
                if need > free:
                    text = f"{size} in {dtype} to {receivers} workers takes {need / 1e9:.0f} GB of {free / 1e9:.0f}"
                    print(f"left out: {text}", file=sys.stderr, flush=True)
                    continue
                rows.append(publication_row(options, size, dtype, receivers))
            if rows:
                report.table(f"{size}, {dtype}: seconds until every worker holds the weights", rows)


def steps(size: str, policy: GPT2, dtype: torch.dtype, threads: int) -> dict[str, Callable[[], object]]:
    """What sender and receiver do, step by step."""
    target = empty_policy(size, dtype)
    buffer = flat_weights(policy, dtype=dtype)
    buffer.setflags(write=False)  # as it arrives from shared memory
    calls: dict[str, Callable[[], object]] = {
        "flatten": partial(flat_weights, policy, dtype=dtype),
        "digest": partial(digest, buffer, 0, threads=threads),
        "copy in": partial(load_flat_weights, target, buffer),
    }
    if not native_problem(target):
        native = NativeModel(target)

        def take_over() -> None:
            load_flat_weights(target, buffer)
            native.refresh()

        calls["copy in and repack"] = take_over
    return calls


def measure_steps(report: Report) -> None:
    """The steps in this process."""
    options = report.options
    rows: list[Row] = []
    for size in options.sizes:
        policy = random_policy(size)
        for dtype in options.dtypes:
            found = interleave(steps(size, policy, DTYPES[dtype], options.threads), repetitions=options.repetitions)
            rows.append({"model": size, "dtype": dtype, **{step: min(times) for step, times in found.items()}})
    report.table("seconds of each step in one process, the shortest", rows)


def main() -> None:
    """Measure the steps, then the whole."""
    options_of = parser(__doc__ and __doc__.splitlines()[0], repetitions=5)
    options_of.add_argument("--sizes", type=words, default=["mini_xl", "medium"], help="of " + ", ".join(SIZES))
    options_of.add_argument("--dtypes", type=words, default=list(DTYPES))
    options_of.add_argument("--workers", type=numbers, default=[1, 2, 4, 8])
    options = options_of.parse_args()
    shrink(options, sizes=["tiny"], workers=[2])
    report = Report("weight_sync", options)
    measure_steps(report)
    measure_publication(report)
    report.close()


if __name__ == "__main__":
    main()
