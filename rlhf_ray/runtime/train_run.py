"""A run of the training loop: from the newest checkpoint to the last step, with what is due after each.

Every rank takes the steps and evaluates; rank 0 also logs, saves and reports.  A checkpoint is a copy in host memory
that the run's writer puts on disk behind the next steps; the next save waits until that is done.

Left out on purpose: Ray, which only starts this, and early stopping, for which the best checkpoint stands
in.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

import torch

from rlhf_ray.checkpoint import CheckpointStore, step_name
from rlhf_ray.console import Progress
from rlhf_ray.doctor import Doctor
from rlhf_ray.run import Run, read_metrics
from rlhf_ray.runtime.step_trace import RanksTrace
from rlhf_ray.runtime.train_loop import TrainLoop
from rlhf_ray.runtime.train_state import ClosingReport, Snapshot
from rlhf_ray.runtime.train_step import World, gather_facts
from rlhf_ray.shortage import named, reduction
from rlhf_ray.storage import mirror_of


class Recorder:
    """What rank 0 does beside its part: log, say, save, report."""

    def __init__(self, loop: TrainLoop, run: Run, inputs: str) -> None:
        self.loop, self.run, self.inputs = loop, run, inputs
        objective = loop.objective
        self.store = CheckpointStore(
            run.folder,
            keep=loop.config.keep,
            keep_every=loop.config.keep_every,
            metric=objective.metric,
            mode=objective.mode,
            mirror=mirror_of(loop.config, objective.stage),
            report=run.say,
        )
        self.doctor = Doctor()
        self.progress: Progress | None = None
        self._portion = loop.portion.size
        self._saving: Future[None] | None = None

    def introduce(self, folder: Path | None) -> None:
        """Say what is about to happen, and forget what came after the checkpoint."""
        loop, run = self.loop, self.run
        run.resume_at(-1 if folder is None else loop.step)  # the first evaluation is step 0's
        self.doctor = Doctor(row for row in read_metrics(run.folder) if "loss" in row)  # not those of evaluations
        trainable = sum(p.numel() for p in loop.model.parameters() if p.requires_grad)
        counts = ", ".join(f"{name} {count:,}" for name, count in loop.data.counts.items())
        for note in loop.data.notes:
            run.say(note)
        run.say(f"data: {counts}; {len(loop.data.train):,} training rows, {len(loop.data.held_out):,} held-out rows")
        run.say(
            f"model: {trainable:,} parameters on {loop.world.device}, {loop.world.dtype_name}, "
            f"{loop.world.size} x {torch.get_num_threads()} threads; "
            f"{loop.total:,} steps of {loop.config.batch_size} rows"
        )
        if folder is not None:
            run.say(f"going on after step {loop.step} from {folder}")
        loop.objective.prepare(loop.world.device, loop.world.dtype)

    def watch_memory(self) -> None:
        """Say when less goes through the model at once than before."""
        portion = self.loop.portion
        if portion.size != self._portion:
            self._portion = portion.size
            self.run.say(reduction(self.loop.objective.stage, portion.setting, portion.size))

    def training(self, metrics: dict[str, float]) -> None:
        """Log the metrics of training steps, and say what the doctor thinks of them."""
        self.run.log(self.loop.step, metrics | self.doctor.tell(self.loop.step, metrics, self.run.say))
        if self.progress is not None:
            self.progress.update(self.loop.step, {"loss": metrics["loss"], "lr": metrics["learning_rate"]})

    def evaluation(self, metrics: dict[str, float]) -> None:
        """Log the metrics of an evaluation."""
        self.run.log(self.loop.step, metrics)
        shown = ", ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in metrics.items())
        self.run.say(f"step {self.loop.step}, held out: {shown}")

    def save(self, score: float | None) -> None:
        """Write a checkpoint behind the next steps; the best by score is kept beside the newest."""
        with self.run.time("save"):
            if self._saving:
                self._saving.result()  # there is room for one copy
            snapshot = self.loop.snapshot(inputs=self.inputs)
            self._saving = self.run.later(self._write, snapshot, score)

    def _write(self, snapshot: Snapshot, score: float | None) -> None:
        def fill(folder: Path) -> None:
            self.loop.objective.save(snapshot.model, folder)
            snapshot.write(folder)

        self.run.say(f"saved {self.store.write(snapshot.state.step, fill, score=score)}")

    def report(self) -> None:
        """Measure and describe the model on disk: the best checkpoint, or the newest where none has a
        score.
        """
        loop, run = self.loop, self.run
        with run.time("save"):
            run.sync()
        folder = self.store.best() or self.store.latest()
        assert folder is not None, "a run that is at its last step has a checkpoint"
        facts = torch.zeros(0, 2, dtype=torch.float64)
        if len(loop.data.held_out):
            model = loop.objective.load(folder, loop.world.device)
            with named(loop.objective.stage, "evaluate", loop.portion):
                facts = gather_facts(loop.objective, model, loop.data.held_out, loop.world.alone(), loop.portion)
        report = loop.objective.report(folder, facts, loop.data, loop.world.device)
        lines = [f"the model is {folder}", *report.lines]
        for line in lines:
            run.say(line)
        if report.metrics and not self._is_reported():
            run.log(loop.step, report.metrics)
            run.sync()
        ClosingReport(step=loop.total, inputs=self.inputs, lines=lines).write(run.folder)

    def _is_reported(self) -> bool:
        """Whether a process that was killed just after it has logged the report: it is the last step's third line,
        after the training's and, where rows are held out, the evaluation's.
        """
        lines = [row for row in read_metrics(self.run.folder) if row["step"] == self.loop.step]
        return len(lines) > 1 + bool(self.loop.data.held_out)

    def close(self) -> None:
        """Have everything on disk, and in the mirror."""
        self.run.sync()
        self.store.close()


def run_loop(loop: TrainLoop, run: Run | None, folder: Path, *, inputs: str, should_stop: Callable[[], bool]) -> bool:
    """Train from the newest complete checkpoint in ``folder`` to the last step; False when stopped before it.

    ``run`` is rank 0's alone; ``inputs`` is the digest of what is trained on.
    """
    recorder = None if run is None else Recorder(loop, run, inputs)
    checkpoint = _newest(recorder, folder, loop.world)
    loop.start(checkpoint)
    if recorder is not None:
        recorder.introduce(checkpoint)
    if checkpoint is None and loop.data.held_out:
        _evaluate(loop, recorder)
    trace = RanksTrace(folder, loop.config.profile_step, loop.world)
    stopped = _steps(loop, recorder, trace, should_stop)
    if recorder is not None:
        if not stopped:
            recorder.report()
        recorder.close()
    return not stopped


def _newest(recorder: Recorder | None, folder: Path, world: World) -> Path | None:
    """Rank 0 looks for a checkpoint, and tells the others which step it found."""
    found = None if recorder is None else recorder.store.newest_complete()
    number = 0 if found is None else 1 + int(found.name.removeprefix("step_"))
    step = int(world.sum(torch.tensor([number], device=world.device))) - 1
    return folder / step_name(step) if step >= 0 else None


def _steps(loop: TrainLoop, recorder: Recorder | None, trace: RanksTrace, should_stop: Callable[[], bool]) -> bool:
    """Every remaining step, with what is due after each; whether it was stopped before the last."""
    config = loop.config
    bar = Progress(loop.objective.stage, loop.total, start=loop.step) if recorder else None
    with loop.inputs, bar or nullcontext():
        if recorder is not None:
            recorder.progress = bar
        while loop.step < loop.total:
            trace.begin(loop.step + 1)
            stop = loop.train_step(should_stop) and loop.step < loop.total
            last = loop.step == loop.total
            if recorder is not None:
                recorder.watch_memory()
            if last or _due(loop.step, config.log_every):
                metrics = loop.take_metrics()
                if recorder is not None:
                    recorder.training(metrics)
            save = last or stop or _due(loop.step, config.save_every)
            score = None
            if loop.data.held_out and not stop and (save or _due(loop.step, config.eval_every)):
                score = _evaluate(loop, recorder)
            if save and recorder is not None:
                recorder.save(score)
            trace.end(loop.step, recorder.run if recorder else None)
            if stop:
                return True
    return False


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluate(loop: TrainLoop, recorder: Recorder | None) -> float:
    metrics = loop.evaluate()
    if recorder is not None:
        recorder.evaluation(metrics)
    return metrics[loop.objective.metric]
