"""The trace of a step: spans on one clock, several processes in one file, and a run that it changes nothing of."""

from __future__ import annotations

import gzip
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import make_world, ppo_config

from rlhf_ray import app, profiling
from rlhf_ray.config import PPOConfig
from rlhf_ray.profiling import span
from rlhf_ray.run import Run, read_metrics
from rlhf_ray.rundir.trace import Lane, Span, laid_out, write_trace
from rlhf_ray.runtime.step_trace import StepTrace

Event = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        found: dict[str, Any] = json.load(file)
    return found


def named(events: list[Event], kind: str) -> dict[Any, str]:
    """Names of lanes (process_name) by their number, or of rows (thread_name) by lane and row."""
    found = [event for event in events if event["ph"] == "M" and event["name"] == kind]
    return {e["pid"] if kind == "process_name" else (e["pid"], e["tid"]): e["args"]["name"] for e in found}


def work() -> None:
    weight = torch.ones(3, 3, requires_grad=True)
    (torch.ones(2, 3) @ weight).sum().backward()


def test_every_thread_is_recorded_on_the_clock_of_the_system(tmp_path: Path) -> None:
    assert span("nobody looks") is span("nor here")
    profiling.warm_up()
    profiling.begin()
    begun = time.time_ns()
    with ThreadPoolExecutor(1, "beside") as threads:
        with span("outside"):
            threads.submit(work).result()
            work()
        ended = time.time_ns()
        profiling.end(tmp_path / "part.json")
    assert span("nobody looks") is span("nor here")
    count = write_trace(tmp_path / "all.gz", [Lane(name="one", recording=tmp_path / "part.json")], begun, {"step": 3})
    trace = read(tmp_path / "all.gz")
    events: list[Event] = trace["traceEvents"]
    assert len(events) == count and trace["otherData"] == {"step": 3} and trace["baseTimeNanoseconds"] == begun
    (outside,) = [event for event in events if event["name"] == "outside"]
    assert 0 <= outside["ts"] <= outside["ts"] + outside["dur"] <= (ended - begun) / 1e3 + 1000  # a millisecond
    products = [event for event in events if event["name"] == "aten::matmul"]
    assert len({event["tid"] for event in products}) == 2
    assert all(outside["ts"] <= event["ts"] <= outside["ts"] + outside["dur"] for event in products)
    assert list(named(events, "thread_name").values()) == ["main thread", "beside_0"]


def recording(path: Path, base: int) -> Path:
    """What torch writes: an operation, its kernel on a GPU, the arrow between them, another thread's operation that had
    just begun when all ended, and marks of its own.
    """
    events: list[Event] = [
        {"ph": "M", "name": "process_labels", "pid": 70, "tid": 0, "args": {"labels": "CPU"}},
        {"ph": "M", "name": "process_labels", "pid": 0, "tid": 0, "args": {"labels": "GPU 0"}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 70, "tid": 71, "ts": 10.5, "dur": 4.0, "args": {}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::item", "pid": 70, "tid": 72, "ts": 9e15, "dur": 0.0, "args": {}},
        {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 12.25, "dur": 30.0, "args": {}},
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 5, "pid": 70, "tid": 71, "ts": 10.5},
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "id": 5, "pid": 0, "tid": 7, "ts": 12.25, "bp": "e"},
        {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "pid": "Spans", "tid": "", "ts": 1.0, "dur": 2.0},
        {"ph": "i", "s": "g", "name": "Record Window End", "pid": "", "tid": "", "ts": 50.0},
    ]
    facts = {"baseTimeNanoseconds": base, "threads": {"70": "main thread", "72": "writer_0"}}
    path.write_text(json.dumps({**facts, "traceEvents": events}), encoding="utf-8")
    return path


def test_processes_of_one_number_become_lanes_of_their_own_with_their_gpus_and_what_others_note(tmp_path: Path) -> None:
    parts = [recording(tmp_path / f"{i}.json", base=1_000_000 * i) for i in (1, 2)]
    noted = [Span(row="ray", name="call", begun=990_000, ended=1_020_000)]
    lanes = [Lane(name="first", recording=parts[0], spans=noted), Lane(name="second", recording=parts[1])]
    write_trace(tmp_path / "all.gz", lanes, 1_000_000, {})
    events: list[Event] = read(tmp_path / "all.gz")["traceEvents"]
    assert list(named(events, "process_name").values()) == ["first", "second"]
    threads = ["thread 71", "GPU 0 stream 7"]
    assert list(named(events, "thread_name").values()) == [*threads, "ray", *threads]
    assert len(named(events, "thread_name")) == len({tid for _, tid in named(events, "thread_name")})
    times = {(e["pid"], e["name"]): (e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert times == {
        (1000, "call"): (0, 20.0),  # it began before
        (1000, "aten::mm"): (10.5, 4.0),
        (1000, "gemm"): (12.25, 30.0),
        (2000, "aten::mm"): (1010.5, 4.0),
        (2000, "gemm"): (1012.25, 30.0),
    }
    arrows = [(e["ph"], e["id"]) for e in events if e["ph"] in "sf"]
    assert len(arrows) == 4 and len({number for _, number in arrows}) == 2


def test_spans_that_overlap_without_nesting_go_to_rows_of_their_own() -> None:
    times = [(0, 10), (2, 10), (3, 5), (5, 9), (8, 12), (10, 11)]
    spans = [Span(row="jobs", name="", begun=begun, ended=ended) for begun, ended in times]
    rows = {(span.begun, span.ended): row for row, span in laid_out(spans)}
    assert [rows[begun, ended] for begun, ended in times] == ["jobs"] * 4 + ["jobs (2)"] + ["jobs"]


def test_a_traced_step_gives_the_numbers_of_one_that_is_not(tmp_path: Path) -> None:
    make_world(tmp_path)
    plain = ppo_config(tmp_path, run="plain", total_steps=2)
    traced = plain.model_copy(update={"run": "traced", "profile_step": 2})
    folders = [app.train_ppo(config) for config in (plain, traced)]
    one, other = (
        [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in read_metrics(folder)]
        for folder in folders
    )
    assert one == other
    assert [path.name for path in (folders[1] / "trace").iterdir()] == ["step_000002.json.gz"]
    assert "trace of step 2: " in (folders[1] / "log.txt").read_text()
    events: list[Event] = read(folders[1] / "trace" / "step_000002.json.gz")["traceEvents"]
    phases = {"generate", "judge", "credit", "learn", "publish", "save"}
    calls = {"RolloutWorker.generate", "RewardWorker.score", "LearnerWorker.update", "RolloutWorker.update_weights"}
    assert {event["name"] for event in events} >= {"step 2", "prefill", "decode", "draw"} | phases | calls


def test_a_step_that_does_not_come_is_said(tmp_path: Path) -> None:
    trace = StepTrace(tmp_path, 2, name="resumed")
    with Run.open(tmp_path, {}, resume=False) as run:
        for step in (3, 4):
            trace.begin(step)
            trace.end(step, run)
    assert (tmp_path / "log.txt").read_text().count("step 2 was done before: there is no trace of it") == 1
    with pytest.raises(ValueError, match="profile_step = 3 is after the last step, 2"):
        PPOConfig(total_steps=2, profile_step=3)
