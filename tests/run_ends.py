"""All that a run leaves behind, without what the clock says: what two runs must have in common to be the same."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow.parquet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_ray.checkpoint import step_name, verify
from rlhf_ray.run import read_metrics

TIMES = ("time/", "perf/")


def end_of(folder: Path, steps: int) -> dict[str, Any]:
    """Metrics, TensorBoard events, samples, and SHA-256 of every file of the last checkpoint but its manifest."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    last = folder / step_name(steps)
    verify(last)
    return {
        "metrics": [
            {name: value for name, value in row.items() if not name.startswith(TIMES)} for row in read_metrics(folder)
        ],
        "events": {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if not tag.startswith(TIMES)
        },
        "samples": {
            path.name: pyarrow.parquet.read_table(path).to_pylist() for path in sorted((folder / "samples").glob("*"))
        },
        "sha256": {
            str(path.relative_to(last)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(last.rglob("*"))
            if path.is_file() and path.name != "manifest.json"
        },
    }
