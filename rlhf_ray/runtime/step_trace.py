"""The trace of one step: every process of a run records what it does, and the run's writer makes one file of it.

Workers begin to record after what they are at, and end in the same way: a call that is under way when the step begins
is not in the trace, and one that is when it ends is there as a whole.  The driver adds its phases, how long calls have
waited for a worker, and what Ray itself has noted of every process.

Left out on purpose: whatever could fail a run.  A worker that is not there any more is said to be missing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from rlhf_ray import profiling
from rlhf_ray.checkpoint import step_name
from rlhf_ray.profiling import Trace
from rlhf_ray.run import Run
from rlhf_ray.rundir.trace import Lane, Span, write_trace
from rlhf_ray.runtime.crew import RayCrew
from rlhf_ray.runtime.train_step import World

HOW_TO_OPEN = "open it at https://ui.perfetto.dev, or in chrome://tracing"
RAY_SECONDS = 30.0
"""At most, until Ray tells of a call that has ended; it gathers them for a second, and more on a busy machine."""
LOOK_SECONDS = 0.5


class StepTrace(Trace):
    """The trace of a run in one process, and what all traces have in common."""

    def __init__(self, folder: Path, step: int, *, name: str) -> None:
        """``folder`` is the run's; ``step`` counts from 1 as metrics.jsonl does, and 0 is none.

        ``name`` is that of this process's lane.
        """
        self.step, self.name = step, name
        self.path = folder / "trace" / f"{step_name(step)}.json.gz"
        self._parts = folder / "trace" / step_name(step)
        self._begun = 0
        self._step = ExitStack()
        self._ready = False

    def begin(self, step: int) -> None:
        """Record from now on if this is the step, anew if it is done again; before it, make ready for that."""
        if step <= self.step and not self._ready:
            self._ready = True
            self.everybody("warm_up")
        if step == self.step:
            self._begun = time.time_ns()
            self._parts.mkdir(parents=True, exist_ok=True)
            self.everybody("begin")
            self._step.enter_context(profiling.span(f"step {step}"))

    def end(self, step: int, run: Run | None) -> None:
        """Write what was recorded, if this is the step; the ``run`` then has all parts made into one file."""
        if run and 0 < self.step < step and not self._ready:
            self._ready = True
            run.say(f"step {self.step} was done before: there is no trace of it")
        if step != self.step:
            return
        self._step.close()
        whole = Span(row="steps", name=f"step {step}", begun=self._begun, ended=time.time_ns())
        profiling.end(self.part(self.name))
        self.others_end()
        if run:
            run.note(step, f"{self.path}: {HOW_TO_OPEN}")
            run.later(self._merge, run, whole)

    def close(self) -> None:
        """Record no longer, if the step was broken off."""
        self._step.close()
        profiling.drop()

    def part(self, name: str) -> Path:
        """Where a process writes what it has recorded."""
        return self._parts / f"{name}.json"

    def everybody(self, what: str) -> None:
        """Have this process, and all others who take part, do something."""
        getattr(profiling, what)()

    def others_end(self) -> None:
        """Have the other processes write what they have recorded."""

    def lanes(self, whole: Span) -> tuple[list[Lane], list[str]]:
        """Everybody's lanes, and who is missing; called by the writer, and waits until all have written."""
        return [Lane(name=self.name, recording=self.part(self.name))], []

    def _merge(self, run: Run, whole: Span) -> None:
        try:
            lanes, missing = self.lanes(whole)
            facts = {"run": run.folder.name, "step": self.step, "missing": missing}
            count = write_trace(self.path, lanes, whole.begun, facts)
        except (OSError, ValueError, RayError) as error:  # a full disk, a part that one has cut short, a lost cluster
            run.say(f"the trace of step {self.step} can't be written: {error}")
        else:
            without = f"; without {', '.join(missing)}, which ended before the step did" if missing else ""
            size = self.path.stat().st_size / 1e6
            run.say(f"trace of step {self.step}: {self.path}, {count:,} events, {size:.1f} MB{without}; {HOW_TO_OPEN}")
        finally:
            shutil.rmtree(self._parts, ignore_errors=True)


class CrewsTrace(StepTrace):
    """The trace of a run whose workers are actors."""

    def __init__(self, folder: Path, step: int, *, name: str, crews: Sequence[RayCrew], patience: float) -> None:
        """``patience`` is how many seconds workers may take over what they are at when the step ends."""
        super().__init__(folder, step, name=name)
        self._crews = sorted(crews, key=lambda crew: crew.together)  # below who answers and judges, who learns from it
        self._patience = patience
        self._actors: dict[str, Any] = {}
        self._told: dict[str, Any] = {}

    def everybody(self, what: str) -> None:
        """All who are there now."""
        self._actors = {name: actor for crew in self._crews for name, actor in crew.ready.items()}
        for actor in self._actors.values():
            actor.trace.options(name=f"trace.{what}").remote(what)
        super().everybody(what)

    def others_end(self) -> None:
        """Those who have begun."""
        self._told = {
            name: actor.trace.options(name="trace.end").remote("end", self.part(name))
            for name, actor in self._actors.items()
        }

    def lanes(self, whole: Span) -> tuple[list[Lane], list[str]]:
        """The driver, who waited for a worker, and the workers."""
        ray.wait(list(self._told.values()), num_returns=len(self._told), timeout=self._patience)
        processes, missing = {self.name: ray.get_runtime_context().get_worker_id()}, []
        for name, ref in self._told.items():
            try:
                processes[name] = ray.get(ref, timeout=0)
            except RayError:  # it is dead, or hangs
                missing.append(name)
        noted = _noted(whole, [process for name, process in processes.items() if name != self.name])
        spans = {name: _during(whole, _of_ray(noted.get(process, ()))) for name, process in processes.items()}
        lanes = [Lane(name=name, recording=self.part(name), spans=spans[name]) for name in processes]
        waits = _during(whole, [wait for crew in self._crews for wait in list(crew.queue.waits)])
        return [lanes[0], Lane(name="waiting for a worker", spans=waits), *lanes[1:]], missing


def _noted(whole: Span, workers: Sequence[str]) -> Mapping[str, Sequence[dict[str, Any]]]:
    """What Ray has noted of every process, once it tells of the calls by which workers have ended their recordings."""
    deadline = time.monotonic() + RAY_SECONDS
    while True:
        noted: Mapping[str, Sequence[dict[str, Any]]] = ray._private.state.state.profile_events()
        told = [any(event["start_time"] >= whole.ended for event in noted.get(worker, ())) for worker in workers]
        if all(told) or time.monotonic() > deadline:
            return noted
        time.sleep(LOOK_SECONDS)


def _of_ray(events: Iterable[dict[str, Any]]) -> Iterator[Span]:
    """What Ray has noted of a process: calls, their parts that are Ray's, and what was asked for."""
    for event in events:
        yield Span(row="ray", name=event["event_type"], begun=event["start_time"], ended=event["end_time"])


def _during(whole: Span, spans: Iterable[Span]) -> list[Span]:
    """What has to do with a step."""
    return [span for span in spans if span.begun < whole.ended and span.ended > whole.begun]


class RanksTrace(StepTrace):
    """The trace of a stage's run, of which every rank has one, and the first makes the file."""

    def __init__(self, folder: Path, step: int, world: World) -> None:
        super().__init__(folder, step, name=f"rank {world.rank}")
        self._world = world

    def others_end(self) -> None:
        """Wait until all ranks have written."""
        self._world.sum(torch.zeros(1, device=self._world.device))

    def lanes(self, whole: Span) -> tuple[list[Lane], list[str]]:
        """One a rank."""
        own, missing = super().lanes(whole)
        names = [f"rank {rank}" for rank in range(1, self._world.size)]
        return [*own, *(Lane(name=name, recording=self.part(name)) for name in names)], missing
