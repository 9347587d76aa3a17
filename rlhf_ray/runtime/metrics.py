"""The values of a run's metrics, given to the endpoint that Ray keeps for Prometheus on every machine.

A step's are set by the driver when the step ends, and how many calls wait every second; a worker's by its actor after
every call, so that no number of workers loads the driver.

Left out on purpose: names and meanings (monitoring/metrics.py).
"""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event, Thread

import ray
from ray.util.metrics import Counter, Gauge

from rlhf_ray.monitoring import grafana
from rlhf_ray.monitoring.metrics import BUSY, LABELS, MEMORY, RUNNING, STEP, TOKENS, WAITING, Metric
from rlhf_ray.runtime.dispatch import Queue
from rlhf_ray.types import Usage

REPEAT_SECONDS = 1.0
STATM = Path("/proc/self/statm")
"""Linux alone has it; elsewhere a worker's memory is not shown."""


def place_dashboard() -> None:
    """Put our dashboard beside Ray's own, where the Grafana configuration that Ray has written looks for them.

    Ray empties that folder while it starts, and only the head of a cluster has it.
    """
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "metrics" / "grafana" / "dashboards"
    if folder.is_dir():
        (folder / grafana.FILE_NAME).write_text(json.dumps(grafana.dashboard(), indent=1), encoding="utf-8")


class Shown(Thread):
    """Gauges that keep their values: Ray drops one that has not been set for a few seconds."""

    def __init__(self) -> None:
        super().__init__(name="metrics", daemon=True)
        self._values: dict[tuple[str, str], tuple[Gauge, float, dict[str, str]]] = {}
        self._ended = Event()
        self.start()

    def set(self, gauge: Gauge, value: float, labels: dict[str, str]) -> None:
        """Show a value from now on."""
        gauge.set(value, labels)
        self._values[gauge.info["name"], labels["role"]] = (gauge, value, labels)

    def measure(self) -> None:
        """Set what is to be looked up each time."""

    def run(self) -> None:
        """Set every gauge again and again, until `close`."""
        while not self._ended.wait(REPEAT_SECONDS):
            for gauge, value, labels in list(self._values.values()):
                gauge.set(value, labels)
            self.measure()

    def close(self) -> None:
        """Show nothing from now on."""
        self._ended.set()
        self.join()


class StepMetrics(Shown):
    """The driver's metrics of a run."""

    def __init__(self, run: str, queues: Sequence[Queue]) -> None:
        self._run, self._queues = run, queues
        self._gauges = {metric.name: _gauge(metric) for metric in STEP}
        self._waiting, self._running = _gauge(WAITING), _gauge(RUNNING)
        super().__init__()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show what a step has logged."""
        values = {**metrics, "step": float(step)}
        for metric in STEP:
            if metric.key in values:
                labels = {"run": self._run, "role": metric.role, "worker": ""}
                self.set(self._gauges[metric.name], values[metric.key], labels)

    def measure(self) -> None:
        for queue in self._queues:
            labels = {"run": self._run, "role": queue.name, "worker": ""}
            self._waiting.set(len(queue.ready), labels)
            self._running.set(sum(list(queue.under_way.values())), labels)


class WorkerMetrics(Shown):
    """The metrics of a worker in its own process."""

    def __init__(self, *, run: str, role: str, worker: str) -> None:
        self._labels = {"run": run, "role": role, "worker": worker}
        self._tokens, self._busy = (Counter(m.name, m.meaning, tag_keys=LABELS) for m in (TOKENS, BUSY))
        self._memory = _gauge(MEMORY)
        super().__init__()

    def note(self, used: Usage) -> None:
        """Add what a call has cost."""
        if used.tokens and used.seconds > 0:
            self._tokens.inc(used.tokens, self._labels)
            self._busy.inc(used.seconds, self._labels)

    def measure(self) -> None:
        if STATM.exists():
            pages = int(STATM.read_text().split()[1])
            self._memory.set(pages * resource.getpagesize(), self._labels)


def _gauge(metric: Metric) -> Gauge:
    return Gauge(metric.name, metric.meaning, tag_keys=LABELS)
