"""The one training loop of all objectives, as every rank runs it.

A step is the batch of (seed, step), its gradient, clipping, AdamW.  Everything random follows from seed
and step, so a resumed run is the run that was never stopped.

Left out on purpose: Ray, which only starts this, and early stopping, for which the best checkpoint stands
in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from rlhf_ray.checkpoint import CheckpointStore, load_tree, save_tree, step_name
from rlhf_ray.config import TrainConfig
from rlhf_ray.console import Progress
from rlhf_ray.models.gpt2 import compile_blocks
from rlhf_ray.objectives import Objective
from rlhf_ray.objectives.cached import cached_dataset
from rlhf_ray.run import Run
from rlhf_ray.runtime.train_batches import BatchOrder
from rlhf_ray.runtime.train_input import AHEAD, Inputs
from rlhf_ray.runtime.train_optimiser import apply_gradients, learning_rate, make_optimiser
from rlhf_ray.runtime.train_state import ClosingReport, TrainState, optimiser_path
from rlhf_ray.runtime.train_step import StepInput, World, accumulate, gather_facts, step_input, sum_gradients
from rlhf_ray.runtime.train_window import Window


class TrainLoop:
    """One rank's part of a run."""

    def __init__(self, objective: Objective, config: TrainConfig, world: World) -> None:
        """Read the data; ValueError when none is left, or when a rank would have no row."""
        if config.batch_size < world.size:
            raise ValueError(
                f"batch_size = {config.batch_size} is less than num_workers = {world.size}; every worker needs a row"
            )
        self.objective, self.config, self.world = objective, config, world
        self.data = cached_dataset(objective, config.cache)
        rows = len(self.data.train)
        self.order = BatchOrder(rows=rows, batch_size=config.batch_size, seed=config.seed)
        self.total = self.order.total_steps(epochs=config.epochs, max_steps=config.max_steps)
        self.step = self.tokens = 0
        self.window = Window()
        self.inputs = Inputs(self._input, ahead=AHEAD[world.device.type])

    def start(self, folder: Path | None) -> None:
        """Build the model, or load it and its optimiser from the checkpoint ``folder``."""
        device = self.world.device
        torch.manual_seed(self.config.seed)
        self.model = self.objective.build(device) if folder is None else self.objective.load(folder, device)
        self.model.train()
        if self.config.compile:
            compile_blocks(self.model)
        self.optimiser = make_optimiser(self.model, self.config.optimiser)
        if folder is not None:
            state = TrainState.read(folder)
            self.step, self.tokens = state.step, state.tokens
            self.optimiser.load_state_dict(load_tree(optimiser_path(folder)))

    def train_step(self, should_stop: Callable[[], bool]) -> bool:
        """One optimiser step; whether any rank is asked to stop after it."""
        self.step += 1
        started = time.perf_counter()
        torch.manual_seed(hash((self.config.seed, self.step, self.world.rank)) % 2**63)  # for dropout
        inputs = self.inputs.take(self.step)
        waited = time.perf_counter() - started
        loss = accumulate(self.objective, self.model, inputs, self.world)
        stop = should_stop()
        extras = torch.stack([loss, torch.full_like(loss, float(stop))])
        extras = sum_gradients(self.model, extras, self.world)
        settings = self.config.optimiser
        self.lr = learning_rate(settings, step=self.step, total=self.total)
        norm = apply_gradients(self.optimiser, lr=self.lr, max_grad_norm=settings.max_grad_norm)
        self.tokens += inputs.tokens
        seconds = time.perf_counter() - started
        self.window.add(extras[0], norm, tokens=inputs.tokens, seconds=seconds, waited=waited)
        return stop if self.world.size == 1 else bool(extras[1] > 0)

    def _input(self, step: int) -> StepInput:
        rows = [self.data.train[i] for i in self.order.rows_of(step)]
        return step_input(self.objective, rows, self.world, micro_batch_size=self.config.micro_batch_size)

    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out rows, of which every rank takes its share."""
        size = self.config.micro_batch_size
        facts = gather_facts(self.objective, self.model, self.data.held_out, self.world, micro_batch_size=size)
        return self.objective.metrics(facts)

    def take_metrics(self) -> dict[str, float]:
        """What the steps since the last call came to; ValueError when loss or gradient is not finite."""
        metrics = self.window.take()
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise ValueError(
                f"loss {metrics['loss']} and gradient norm {metrics['grad_norm']} up to step {self.step} are "
                f"not both finite; lower optimiser.lr ({self.config.optimiser.lr}), or take dtype float32"
            )
        return metrics | {
            "learning_rate": self.lr,
            "epoch": self.order.epoch(self.step),
            "tokens": float(self.tokens),
        }

    def save(self, folder: Path, *, inputs: str) -> None:
        """Fill a checkpoint's folder."""
        self.objective.save(self.model, folder)
        optimiser_path(folder).parent.mkdir()
        save_tree(optimiser_path(folder), self.optimiser.state_dict())
        state = TrainState(step=self.step, total_steps=self.total, tokens=self.tokens, inputs=inputs)
        state.write(folder)


class Recorder:
    """What rank 0 does beside its part: log, say, save, report."""

    def __init__(self, loop: TrainLoop, run: Run, inputs: str) -> None:
        self.loop, self.run, self.inputs = loop, run, inputs
        objective = loop.objective
        self.store = CheckpointStore(
            run.folder, keep=loop.config.keep, metric=objective.metric, mode=objective.mode, report=run.say
        )
        self.progress: Progress | None = None

    def introduce(self, folder: Path | None) -> None:
        """Say what is about to happen, and forget what came after the checkpoint."""
        loop, run = self.loop, self.run
        run.resume_at(loop.step)
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
        if loop.step < loop.total:
            loop.objective.prepare(loop.world.device, loop.world.dtype)

    def training(self, metrics: dict[str, float]) -> None:
        """Log the metrics of training steps."""
        self.run.log(self.loop.step, metrics)
        if self.progress is not None:
            self.progress.update(self.loop.step, {"loss": metrics["loss"], "lr": metrics["learning_rate"]})

    def evaluation(self, metrics: dict[str, float]) -> None:
        """Log the metrics of an evaluation."""
        self.run.log(self.loop.step, metrics)
        shown = ", ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in metrics.items())
        self.run.say(f"step {self.loop.step}, held out: {shown}")

    def save(self, score: float | None) -> None:
        """Write a checkpoint; the best by score is kept beside the newest."""
        with self.run.time("save"):
            self.run.sync()
            folder = self.store.write(
                self.loop.step, lambda folder: self.loop.save(folder, inputs=self.inputs), score=score
            )
        self.run.say(f"saved {folder}")

    def report(self) -> None:
        """Measure and describe the model on disk: the best checkpoint, or the newest where none has a
        score.
        """
        loop, run = self.loop, self.run
        folder = self.store.best() or self.store.latest()
        assert folder is not None, "a run that is at its last step has a checkpoint"
        facts = torch.zeros(0, 2, dtype=torch.float64)
        if len(loop.data.held_out):
            model = loop.objective.load(folder, loop.world.device)
            size = loop.config.micro_batch_size
            facts = gather_facts(loop.objective, model, loop.data.held_out, loop.world.alone(), micro_batch_size=size)
        report = loop.objective.report(folder, facts, loop.data, loop.world.device)
        lines = [f"the model is {folder}", *report.lines]
        for line in lines:
            run.say(line)
        if report.metrics:
            run.log(loop.step, report.metrics)
        ClosingReport(step=loop.total, inputs=self.inputs, lines=lines).write(run.folder)


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
    stopped = _steps(loop, recorder, should_stop)
    if recorder is not None and not stopped:
        recorder.report()
    return not stopped


def _newest(recorder: Recorder | None, folder: Path, world: World) -> Path | None:
    """Rank 0 looks for a checkpoint, and tells the others which step it found."""
    found = None if recorder is None else recorder.store.newest_complete()
    number = 0 if found is None else 1 + int(found.name.removeprefix("step_"))
    step = int(world.sum(torch.tensor([number], device=world.device))) - 1
    return folder / step_name(step) if step >= 0 else None


def _steps(loop: TrainLoop, recorder: Recorder | None, should_stop: Callable[[], bool]) -> bool:
    """Every remaining step, with what is due after each; whether it was stopped before the last."""
    config = loop.config
    bar = Progress(loop.objective.stage, loop.total, start=loop.step) if recorder else None
    with loop.inputs, bar or nullcontext():
        if recorder is not None:
            recorder.progress = bar
        while loop.step < loop.total:
            stop = loop.train_step(should_stop) and loop.step < loop.total
            last = stop or loop.step == loop.total
            if last or loop.step % config.log_every == 0:
                metrics = loop.take_metrics()
                if recorder is not None:
                    recorder.training(metrics)
            save = last or _due(loop.step, config.save_every)
            score = None
            if loop.data.held_out and not stop and (save or _due(loop.step, config.eval_every)):
                score = _evaluate(loop, recorder)
            if save and recorder is not None:
                recorder.save(score)
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
