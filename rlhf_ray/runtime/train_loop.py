"""The steps of all objectives, as every rank takes them.

A step is the batch of (seed, step), its gradient, clipping, AdamW.  Everything random follows from seed
and step, so a resumed run is the run that was never stopped.

Left out on purpose: what is due after a step, which ``train_run.py`` knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from rlhf_ray.checkpoint import load_tree
from rlhf_ray.config import TrainConfig
from rlhf_ray.models.gpt2 import checkpoint_blocks, compile_blocks
from rlhf_ray.objectives import Objective
from rlhf_ray.objectives.cached import cached_dataset
from rlhf_ray.profiling import span
from rlhf_ray.rundir.fit import check_optimiser
from rlhf_ray.runtime.train_batches import BatchOrder
from rlhf_ray.runtime.train_input import AHEAD, Inputs
from rlhf_ray.runtime.train_optimiser import apply_gradients, learning_rate, make_optimiser
from rlhf_ray.runtime.train_state import Snapshot, TrainState, optimiser_path
from rlhf_ray.runtime.train_step import StepInput, World, accumulate, gather_facts, step_input, sum_gradients
from rlhf_ray.runtime.train_window import Window
from rlhf_ray.shortage import micro_batch, named
from rlhf_ray.workers.snapshot import copy_of_module, copy_of_state

MOST_SKIPPED = 3
"""Steps in a row whose loss or gradient may not be finite, and which are skipped; that many are a divergence."""


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
        if config.profile_step > self.total:
            raise ValueError(f"profile_step = {config.profile_step} is after the last step, {self.total}")
        self.step = self.tokens = 0
        self.window = Window()
        rows, tokens = config.micro_batch_size, config.micro_batch_tokens
        self.portion = micro_batch(rows, tokens, auto=config.auto_micro_batch)
        self.inputs = Inputs(self._input, ahead=AHEAD[world.device.type])

    def start(self, folder: Path | None) -> None:
        """Build the model, or load it and its optimiser from the checkpoint ``folder``."""
        with named(self.objective.stage, "start"):
            self._start(folder)

    def _start(self, folder: Path | None) -> None:
        device = self.world.device
        torch.manual_seed(self.config.seed)
        self.model = self.objective.build(device) if folder is None else self.objective.load(folder, device)
        self.model.train()
        if self.config.compile:
            compile_blocks(self.model)
        if self.config.memory.activation_checkpointing:
            checkpoint_blocks(self.model)
        kept = self.config.memory
        self.optimiser = make_optimiser(
            self.model, self.config.optimiser, bits=kept.optimizer_bits, offload=kept.offload_optimizer
        )
        if folder is not None:
            state = TrainState.read(folder)
            self.step, self.tokens, self.window = state.step, state.tokens, Window(**state.window)
            optimiser = load_tree(optimiser_path(folder))
            check_optimiser(self.optimiser, optimiser, optimiser_path(folder))
            self.optimiser.load_state_dict(optimiser)

    def train_step(self, should_stop: Callable[[], bool]) -> bool:
        """One optimiser step; whether any rank is asked to stop after it."""
        self.step += 1
        started, stage = time.perf_counter(), self.objective.stage
        with named(stage, "learn", self.portion):
            inputs, loss, waited = self.portion.attempt(self._gradient, self._lengths, undo=self._forget)
        stop = should_stop()
        extras = torch.stack([loss, torch.full_like(loss, float(stop))])
        extras = sum_gradients(self.model, extras, self.world)
        settings = self.config.optimiser
        self.lr = learning_rate(settings, step=self.step, total=self.total)
        with named(stage, "optimiser step"):
            norm = apply_gradients(self.optimiser, extras[0], lr=self.lr, max_grad_norm=settings.max_grad_norm)
        self.tokens += inputs.tokens
        seconds = time.perf_counter() - started
        self.window.add(extras[0], norm, tokens=inputs.tokens, seconds=seconds, waited=waited)
        return stop if self.world.size == 1 else bool(extras[1] > 0)

    def _gradient(self) -> tuple[StepInput, torch.Tensor, float]:
        """Add this rank's share of the step's gradient up; the input, its share of the loss, and seconds waited."""
        started = time.perf_counter()
        torch.manual_seed(hash((self.config.seed, self.step, self.world.rank)) % 2**63)  # for dropout
        with span("input"):
            inputs = self.inputs.take(self.step)
        waited = time.perf_counter() - started
        with span("gradient"):
            return inputs, accumulate(self.objective, self.model, inputs, self.world), waited

    def _forget(self) -> None:
        """Forget a gradient that was not finished, and inputs that are cut for larger passes."""
        self.optimiser.zero_grad(set_to_none=True)
        self.inputs.forget()

    def _lengths(self) -> torch.Tensor:
        return torch.tensor([self.data.train[i].length for i in self.order.rows_of(self.step)])

    def _input(self, step: int) -> StepInput:
        rows = [self.data.train[i] for i in self.order.rows_of(step)]
        return step_input(self.objective, rows, self.world, self.portion)

    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out rows, of which every rank takes its share."""
        with named(self.objective.stage, "evaluate", self.portion), span("evaluate"):
            facts = gather_facts(self.objective, self.model, self.data.held_out, self.world, self.portion)
        return self.objective.metrics(facts)

    def take_metrics(self) -> dict[str, float]:
        """What the steps since the last call came to; ValueError when the newest few of them were all skipped."""
        self._check_finite()
        return self.window.take() | {
            "learning_rate": self.lr,
            "epoch": self.order.epoch(self.step),
            "tokens": float(self.tokens),
        }

    def snapshot(self, *, inputs: str) -> Snapshot:
        """What a checkpoint holds, copied into host memory; ValueError as for ``take_metrics``."""
        self._check_finite()
        window = self.window.values()
        state = TrainState(step=self.step, total_steps=self.total, tokens=self.tokens, inputs=inputs, window=window)
        with named(self.objective.stage, "save"):
            model = copy_of_module(self.model, self.model)
            self.objective.finish(self.model, model)
            return Snapshot(model=model, optimiser=copy_of_state(self.optimiser.state_dict()), state=state)

    def _check_finite(self) -> None:
        if bad := self.window.skipped_at_last(MOST_SKIPPED):
            loss, norm = bad
            raise ValueError(
                f"loss {loss} and gradient norm {norm} at step {self.step}, as of the steps before, are "
                f"not both finite; lower optimiser.lr ({self.config.optimiser.lr}), or take dtype float32"
            )
