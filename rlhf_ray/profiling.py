"""This process's part in the trace of a step: torch's profiler, with spans that our own code names.

All threads are recorded, and the kernels of a GPU that the process computes on.  While nothing is recorded, a span is
one look at a variable.

Left out on purpose: shapes, stacks and memory, which would make a step several times slower and its trace as much
larger; which processes take part, and what becomes of their files (``runtime/step_trace.py``, ``rundir/trace.py``).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import get_native_id
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.profiler import profile


class Trace:
    """Who has every process of a run record one of its steps; this one has nobody."""

    def begin(self, step: int) -> None:
        """Take notice that a step begins, counted from 1."""

    def end(self, step: int, run: Any) -> None:
        """Take notice that it has ended, for the `Run` to keep what came of it."""

    def close(self) -> None:
        """Take notice that no step comes any more, maybe in the middle of one."""


ENVIRONMENT = {
    "KINETO_LOG_LEVEL": "6",  # it says at every start and stop that it starts and stops
    "TEARDOWN_CUPTI": "0",  # which the CUDA graphs of generation would not survive
}
MAIN_THREAD = "main thread"
_NOTHING = nullcontext()
_profile: profile | None = None


def span(name: str) -> AbstractContextManager[Any]:
    """Name what is done inside, for a trace if there is one."""
    if _profile is None:
        return _NOTHING
    from torch.profiler import record_function

    return record_function(name)


def begin() -> None:
    """Record what this process does from now on; what was recorded before is dropped.

    The first time in a process takes a second, which is torch's.
    """
    import torch
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile

    global _profile
    drop()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_initialized() else [])]
    begun = profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True))
    begun.start()
    _profile = begun


def end(path: Path) -> None:
    """Write what was recorded as torch's JSON, into a folder that is there; whoever calls is the main thread."""
    global _profile
    assert _profile, "nothing was recorded"
    ended, _profile = _profile, None
    names = {thread.native_id: thread.name for thread in threading.enumerate()} | {get_native_id(): MAIN_THREAD}
    ended.add_metadata_json("threads", json.dumps(names))  # torch knows them by their numbers alone
    ended.stop()
    ended.export_chrome_trace(str(path))


def drop() -> None:
    """Record no longer, and forget what was recorded."""
    global _profile
    if _profile:
        _profile.stop()
        _profile = None


def warm_up() -> None:
    """Have the first time over before it counts."""
    with _silence():
        begin()
        drop()


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard error: torch complains of threads other than the main one there, though all goes well."""
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
