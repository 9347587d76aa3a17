"""The trace of a step as one file: what several processes have recorded, side by side on one clock.

The format is Chrome's (https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU), compressed,
which https://ui.perfetto.dev and chrome://tracing open as it is.  Every process is a lane with a row a thread; the
streams of its GPU and what others have noted of it are rows of the same lane.

Left out on purpose: clocks of several machines, which are taken to agree.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.profiling import MAIN_THREAD

ROWS = 1000
"""Rows that a lane may have.  Lanes are numbered in thousands, as viewers write the number behind the name, where it is
not to be taken for a worker's; rows count on from there, as some viewers want numbers that are unique in the trace.
"""
FLOWS = "stf"
"""Phases of arrows: start, step, finish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that took from ``begun`` to ``ended``, in unix nanoseconds."""

    row: str
    name: str
    begun: int
    ended: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A process."""

    name: str
    recording: Path | None = None
    """What it has recorded itself, as torch writes it."""
    spans: Sequence[Span] = ()
    """What others have noted of it."""


def write_trace(path: Path, lanes: Iterable[Lane], begun: int, facts: Mapping[str, Any]) -> int:
    """Write the lanes, one below the other, and whatever ``facts`` are to be kept with them; returns how many events
    there are.

    Times count from ``begun``, in unix nanoseconds; what others have noted begins there if it began before.
    """
    head = {"displayTimeUnit": "ms", "baseTimeNanoseconds": begun, "otherData": facts}
    temporary, count = path.with_suffix(".tmp"), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with gzip.open(temporary, "wt", compresslevel=5, encoding="utf-8") as file:
            file.write(json.dumps(head)[:-1] + ', "traceEvents": [')
            for number, lane in enumerate(lanes, start=1):
                for event in _Writing(number, lane, begun).events():
                    file.write((",\n" if count else "\n") + json.dumps(event, separators=(",", ":")))
                    count += 1
            file.write("\n]}\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


class _Writing:
    """A lane on its way into the file."""

    def __init__(self, number: int, lane: Lane, begun: int) -> None:
        self._number, self._lane, self._begun = number, lane, begun
        self._pid = number * ROWS
        self._rows: dict[Any, int] = {}

    def events(self) -> Iterator[dict[str, Any]]:
        """Everything, names first."""
        yield self._name("process_name", name=self._lane.name)
        yield self._name("process_sort_index", sort_index=self._number)
        if self._lane.recording:
            yield from self._recorded(json.loads(self._lane.recording.read_bytes()))
        for row, span in laid_out(self._lane.spans):
            yield from self._row(row, row)
            begun = max(span.begun, self._begun)
            yield self._event("X", row, span.name, begun, cat="noted") | {"dur": (span.ended - begun) / 1e3}

    def _recorded(self, trace: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What torch has recorded: operations, spans, kernels, and the arrows between them.

        Its ``pid`` is the process, or the number of a GPU.  The main thread's row is the first.
        """
        base, found, threads = trace["baseTimeNanoseconds"], trace["traceEvents"], trace["threads"]
        labels = {event["pid"]: event["args"]["labels"] for event in found if event["name"] == "process_labels"}
        (ended,) = [event["ts"] for event in found if event["name"] == "Record Window End"]
        for event in sorted(found, key=lambda event: threads.get(str(event["tid"])) != MAIN_THREAD):
            pid, tid, phase = event["pid"], event["tid"], event["ph"]
            if pid not in labels or phase not in ("X", *FLOWS):
                continue  # names, which are ours to give, and marks of the profiler itself
            if event["ts"] > ended:
                continue  # a thread had just begun it when all ended: it begins in the year 2262
            thread = threads.get(str(tid), f"thread {tid}")
            yield from self._row((pid, tid), thread if labels[pid] == "CPU" else f"{labels[pid]} stream {tid}")
            at = base + round(event["ts"] * 1e3)
            made = self._event(phase, (pid, tid), event["name"], at, cat=event["cat"])
            made |= {name: event[name] for name in ("dur", "bp") if name in event}
            if phase in FLOWS:
                made["id"] = event["id"] * ROWS + self._number  # another process's arrows have the same numbers
            yield made

    def _row(self, row: Any, name: str) -> Iterator[dict[str, Any]]:
        """The name of a row, when it is first met."""
        if row not in self._rows:
            self._rows[row] = len(self._rows) + 1
            yield self._name("thread_name", row, name=name)
            yield self._name("thread_sort_index", row, sort_index=self._rows[row])

    def _name(self, what: str, row: Any = None, **arguments: Any) -> dict[str, Any]:
        tid = self._tid(row) if row else self._pid
        return {"ph": "M", "name": what, "pid": self._pid, "tid": tid, "args": arguments}

    def _event(self, phase: str, row: Any, name: str, at: int, *, cat: str) -> dict[str, Any]:
        since = (at - self._begun) / 1e3
        return {"ph": phase, "name": name, "cat": cat, "pid": self._pid, "tid": self._tid(row), "ts": since}

    def _tid(self, row: Any) -> int:
        return self._pid + self._rows[row]


def laid_out(spans: Iterable[Span]) -> Iterator[tuple[str, Span]]:
    """Spans with the rows to draw them in: their own, or others beside it where they would overlap without one lying
    inside of the other, which no viewer draws.
    """
    open_until: dict[str, list[int]] = {}
    for span in sorted(spans, key=lambda span: (span.begun, -span.ended)):
        number, row = 1, span.row
        while True:
            ends = open_until.setdefault(row, [])
            while ends and ends[-1] <= span.begun:
                ends.pop()
            if not ends or ends[-1] >= span.ended:
                break
            number += 1
            row = f"{span.row} ({number})"
        ends.append(span.ended)
        yield row, span
