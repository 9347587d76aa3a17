"""Publishing weights: from the moment that the learner is asked until every rollout worker holds them.

    python benchmarks/weight_sync.py --json weight_sync.json
    python benchmarks/weight_sync.py --machines 2 --sizes mini_xl --dtypes float32 --sides store,direct --workers 2,4

Sender and receivers are real Ray actors on this machine, called through the crews that PPO calls.  The sides: through
Ray's object store; directly, by a broadcast over gloo; and the obvious way, a state_dict of torch tensors as one
actor's return value and the others' argument, unchecked.  Several ``--machines`` are raylets, each with a store of its
own, among which the workers are spread.  What does not fit into memory is left out, and said.  The steps by themselves
are timed in this process.
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
from typing import Any

from side_by_side import Report, Row, interleave, numbers, parser, ratio, shrink, words  # isort: skip
import torch
from machine import DTYPES, free_bytes
from ray.cluster_utils import Cluster
from torch import Tensor

from rlhf_ray.failures import Deaths
from rlhf_ray.generation.native_model import NativeModel, native_problem
from rlhf_ray.models import GPT2, preset
from rlhf_ray.models.flat import flat_weights, load_flat_weights
from rlhf_ray.runtime.all_crews import stop, wait_until_built
from rlhf_ray.runtime.cluster import connect
from rlhf_ray.runtime.crew import RayCrew
from rlhf_ray.runtime.placement import Request
from rlhf_ray.runtime.weight_sync import Broadcasts
from rlhf_ray.types import Handle, Usage, Weights
from rlhf_ray.workers.direct import Broadcast, Inlet, Notice
from rlhf_ray.workers.groups import Given
from rlhf_ray.workers.ranks import Meeting
from rlhf_ray.workers.weights import digest, export_weights, import_weights

SIZES = {"tiny": 4103, "mini_xl": 50264, "medium": 50264}
"""Models and their vocabularies."""
ACTOR_BYTES = 300e6
"""Of an actor before it has a model."""


class Sender:
    """A learner that has nothing but float32 weights."""

    def __init__(self, size: str, dtype: torch.dtype, threads: int) -> None:
        self.policy, self.dtype = random_policy(size), dtype
        self.threads, self.sender = threads, Broadcast(1, threads=threads)
        self.times: list[float] = []

    def exported(self, version: int) -> Weights:
        """For the store."""
        start = time.perf_counter()
        weights = export_weights(self.policy, version, self.dtype, threads=self.threads)
        self.times = [start, time.perf_counter()]
        return weights

    def weights(self, version: int, meeting: Meeting | None = None) -> Notice:
        """To those who are at the meeting."""
        return self.sender.publish(self.policy, version, self.dtype, meeting)

    def state_dict(self) -> dict[str, Tensor]:
        """The obvious way."""
        carrier = torch.int16 if self.dtype == torch.bfloat16 else self.dtype  # tensors travel as numpy arrays
        return {name: x.to(self.dtype).view(carrier) for name, x in self.policy.state_dict().items()}

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
        self.threads, self.inlet = threads, Inlet(torch.device("cpu"))
        self.times: list[float] = []

    def receive(self, meeting: Meeting) -> None:
        """Beside other calls."""
        self.inlet.receive(meeting)

    def take(self, notice: Notice) -> bool:
        """What was received."""
        with self.inlet.found(notice) as weights:
            assert weights is not None, f"the weights have not come: {notice.problem}"
            self.update_weights(weights)
        return True

    def update_weights(self, weights: Weights) -> None:
        """Check and copy in."""
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
        seats = connect(need=[request("sender", 1), request("receiver", receivers)])
        share = max(1, threads // receivers)
        self.sender, self.receivers = self.crews = [
            RayCrew(
                worker,
                {"size": size, "dtype": dtype, "threads": own},
                role=role,
                seats=seats[role],
                deaths=Deaths(0, 60.0, print),
                timeout=600.0,
                together=worker is Sender,
                beside=worker is Receiver,
            )
            for role, worker, own in (("sender", Sender, threads), ("receiver", Receiver, share))
        ]
        wait_until_built(self.crews)
        self.broadcasts = Broadcasts(self.sender, self.receivers, print)

    def store(self) -> None:
        """Publish through the store, noting when each step began."""
        self.version += 1
        found = self._publish("update_weights", self.sender.call("exported", self.version))
        begun, exported = self.sender.call("stamps").result()
        self.seconds["export"].append(exported - begun)
        self.seconds["hand over"].append(min(start for start, _ in found) - exported)
        self.seconds["take over"].append(max(end - start for start, end in found))

    def direct(self) -> None:
        """Publish by a broadcast."""
        self.version += 1
        self._publish("update_weights", self.broadcasts.publish(self.version))

    def tensors(self) -> None:
        """Publish the obvious way."""
        self._publish("load_state", self.sender.call("state_dict"))

    def _publish(self, take: str, value: Handle[Any]) -> list[list[float]]:
        """Wait until every receiver holds what the sender gives; their stamps."""
        given = Given(take, value)
        answers = [self.receivers.call("stamps", given=given) for _ in range(self.receivers.size)]
        who, found = zip(*(answer.result() for answer in answers), strict=True)
        assert len(set(who)) == self.receivers.size, "one receiver was asked twice"
        return list(found)


def request(role: str, count: int) -> Request:
    """A small share each, wherever the fewest of its role are."""
    return Request(role=role, count=count, cpus=0.1, gpus=0.0, spread=True)


def needed_bytes(parameters: int, dtype: torch.dtype, receivers: int, options: argparse.Namespace) -> float:
    """Memory at the worst moment: models, the sender's buffers, two versions in each store, what has come directly, and
    copies of tensors.
    """
    one = parameters * dtype.itemsize
    copies = 1 + sum(side in options.sides for side in ("direct", "tensors"))
    stores = 2 * options.machines if "store" in options.sides else 0
    return 4 * parameters + (2 + stores + receivers * copies) * one + (receivers + 2) * ACTOR_BYTES


def publication_row(options: argparse.Namespace, size: str, dtype: str, receivers: int) -> Row:
    """Every way, in turn."""
    parameters = sum(p.numel() for p in empty_policy(size, DTYPES[dtype]).parameters())
    about = {"model": size, "dtype": dtype, "MB": parameters * DTYPES[dtype].itemsize / 1e6, "workers": receivers}
    publication = Publication(size, DTYPES[dtype], receivers, options.threads)
    try:
        times = interleave(
            {side: getattr(publication, side) for side in options.sides}, repetitions=options.repetitions
        )
    finally:
        stop(publication.crews)
    steps = {step: statistics.median(found[1:]) for step, found in publication.seconds.items() if found}
    whole = {f"{name}, whole": statistics.median(found) for name, found in times.items()}
    first, *others = times
    faster = {f"{first} is faster than {side} by": ratio(times[first], times[side]) for side in others}
    return {**about, **steps, **whole, **faster}


def measure_publication(report: Report) -> None:
    """Every size, type and number of receivers that fits."""
    options = report.options
    for size in options.sizes:
        parameters = sum(p.numel() for p in empty_policy(size, torch.float32).parameters())
        for dtype in options.dtypes:
            rows = []
            for receivers in options.workers:
                need = needed_bytes(parameters, DTYPES[dtype], receivers, options)
                free = min(free_bytes(), options.memory * 1e9)
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
    options_of.add_argument("--sides", type=words, default=["store", "direct", "tensors"])
    options_of.add_argument("--machines", type=int, default=1, help="raylets that workers are spread over")
    options_of.add_argument("--memory", type=float, default=math.inf, help="GB, at most")
    options = options_of.parse_args()
    shrink(options, sizes=["tiny"], workers=[1])
    report = Report("weight_sync", options)
    if options.machines == 1:
        measure_steps(report)
        measure_publication(report)
    else:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        for _ in range(options.machines - 1):
            cluster.add_node(num_cpus=2)
        os.environ["RAY_ADDRESS"] = cluster.address
        measure_publication(report)
        cluster.shutdown()
    report.close()


if __name__ == "__main__":
    main()
