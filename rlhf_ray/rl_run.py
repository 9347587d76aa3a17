"""A reinforcement-learning run: batches of prompts in, metrics, samples and checkpoints out.

It goes on exactly where a checkpoint left off: prompts and random streams are functions of the step, the learner's
and the tracked states are in the checkpoint, with the batches that were sampled ahead of it, and what was written after
it is taken back.

Everything is written behind the steps, by the run's writer: the learner keeps a snapshot of itself, and at most one
checkpoint is under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor

from rlhf_ray.checkpoint import CheckpointError, CheckpointStore, load_tree, save_tree
from rlhf_ray.config import PPOConfig
from rlhf_ray.data.prompt_set import PromptSet
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.failures import Deaths, Diverged, GaveUp, WorkerLost
from rlhf_ray.health import Health
from rlhf_ray.live import RunView
from rlhf_ray.ops.kl import raised
from rlhf_ray.probes import Asked, Probes
from rlhf_ray.profiling import Trace
from rlhf_ray.roles import Generator, J, Roles, S, Stateful
from rlhf_ray.run import Run
from rlhf_ray.samples import histograms, sample_rows, texts
from rlhf_ray.shortage import reduction
from rlhf_ray.startup import StartUp
from rlhf_ray.storage import Mirror
from rlhf_ray.tokenizer import Tokenizer, write_hf_tokenizer
from rlhf_ray.types import Done, Experience, Handle, Judged, Rollout, Shards, select

JUDGED_ROWS = 32
"""Rows of a step that judges are asked about: a random choice, as prompts come in a shuffled order."""


class SavesItself(Protocol):
    """A learner that can write and read its part of a checkpoint."""

    def snapshot(self) -> Handle[None]: ...

    def write(self, folder: Path) -> None: ...  # the newest snapshot

    def load(self, folder: Path) -> None: ...


class RLRun:
    """One run of an RL algorithm in its folder."""

    def __init__(
        self,
        run: Run,
        config: PPOConfig,
        roles: Roles,
        learner: SavesItself,
        tokenizer: Tokenizer,
        prompts: PromptSet,
        startup: StartUp | None = None,
        mirror: Mirror | None = None,
        deaths: Deaths | None = None,
        probes: int = 0,
        watch: Callable[[int, Mapping[str, float]], None] | None = None,
        judges: Mapping[str, Callable[[Rollout], Tensor]] | None = None,
        rollbacks: int = 0,
        trace: Trace | None = None,
    ) -> None:
        """Take the newest complete checkpoint in the run's folder up, if there is one.

        ``startup`` is what came before the first step, of which the run then tells; ``deaths`` are its workers'.  So
        many ``probes`` follow the prompts in the workers' prompt set.  ``watch`` is given every step's metrics,
        ``judges`` some of its rows, to give their scores (B,), of which the means are logged.  The run has gone back
        ``rollbacks`` times because it had diverged; ``trace`` may be of a step to come.
        """
        self.startup, self.deaths, self.watch, self.judges = startup, deaths, watch, judges or {}
        self.trace = trace or Trace()
        self.run, self.config, self.roles = run, config, roles
        self.learner, self.tokenizer, self.prompts = learner, tokenizer, prompts
        asked = range(len(prompts), len(prompts) + probes)
        self.probes = Probes(prompts=asked, roles=roles, config=config, tokenizer=tokenizer)
        self.stream = PromptStream(len(prompts), config.batch_size, group_size=config.group_size, seed=config.seed)
        self.store = CheckpointStore(
            run.folder, keep=config.keep, keep_every=config.keep_every, mirror=mirror, report=run.say
        )
        self.first_step = 0
        self._done = self._last_saved = 0
        self._open = ExitStack()
        self._stopping = False
        self._reduced: dict[tuple[str, str], int] = {}
        self._saving: Future[None] | None = None
        self._ahead: deque[Shards[Rollout]] = deque()
        self._tracked: dict[str, Stateful] = {}
        self._saved: dict[str, Any] = {}
        if checkpoint := self.store.newest_complete():
            self._take_up(checkpoint)
        self._done = self._last_saved = self.first_step
        run.resume_at(self.first_step)
        self.health = self.track("health", Health(run, config, rollbacks))
        self.health.resume_at(self.first_step)

    def _take_up(self, checkpoint: Path) -> None:
        _check_vocabulary(checkpoint, self.tokenizer)
        state = load_tree(checkpoint / "run")
        self.first_step, self._saved = state["step"], state["tracked"]
        self._ahead = _fresh(load_tree(checkpoint / "ahead"), self.first_step, self.config.max_staleness)
        self.learner.load(checkpoint)
        self.run.say(f"going on from {checkpoint}")

    @property
    def rollbacks(self) -> int:
        """How often the run has gone back because it had diverged."""
        return self.health.rollbacks

    def track(self, name: str, state: S) -> S:
        """Restore a small state from the checkpoint that was taken up, and save it with the next ones."""
        if name in self._saved:
            state.load_state_dict(self._saved[name])
        self._tracked[name] = state
        return state

    def time(self, phase: str) -> AbstractContextManager[None]:
        """Add the seconds inside to ``time/<phase>``."""
        return self.run.time(phase)

    def rollouts(
        self, generator: Generator, judge: Callable[[Shards[Rollout]], J]
    ) -> Iterator[tuple[int, Shards[Rollout], J]]:
        """Steps, their rollouts and what ``judge`` makes of those, until done or asked to stop.

        Before a step is yielded, the batch ``max_staleness`` steps on is asked for, with the weights of this step.
        """
        total = self.config.total_steps
        opinions = deque(judge(shards) for shards in self._ahead)
        if self.config.on_divergence == "rollback" and self.store.latest() is None:
            self._save(0)
        with self._open:
            self._progress = self._open.enter_context(RunView(f"ppo/{self.config.run}", total, start=self.first_step))
            self._open.callback(self.trace.close)
            for step in range(self.first_step, total):
                self.trace.begin(step + 1)
                self._started = perf_counter()
                asked = self.probes.ask(step) if self.probes.due(step) else None
                while len(self._ahead) <= min(self.config.max_staleness, total - 1 - step):
                    with self.run.time("generate"):
                        batch = self.stream.take(step + len(self._ahead))
                        self._ahead.append(generator.generate(batch, step))
                    with self.run.time("judge"):
                        opinions.append(judge(self._ahead[-1]))
                if asked:
                    self._keep_probes(step, asked)
                yield step, self._ahead.popleft(), opinions.popleft()
                if self._stopping and step + 1 < total:
                    self.run.sync()
                    self.run.say(f"stopped after step {step + 1}; the same command goes on from here")
                    return

    def end_step(self, step: int, judged: Judged, experience: Experience, metrics: dict[str, float]) -> None:
        """Log the step, keep samples, and save when it is time or the run is asked to stop."""
        done = step + 1
        staleness = (step - judged.rollout.policy_version).float()
        metrics = {
            **metrics,
            "staleness/mean": float(staleness.mean()),
            "staleness/max": float(staleness.max()),
            "episode": float(done * len(judged.rollout)),
            **self._throughput(),
            "time/step": perf_counter() - self._started,
        }
        if self.deaths:
            metrics["perf/restarts"] = float(self.deaths.count)
        if step == self.first_step and self.startup:
            self.startup.done("first_step")
            metrics |= self.startup.metrics()
            self.run.say(str(self.startup))
        if self.config.sample_rows and (done % self.config.samples_every == 0 or done == 1):
            self.run.samples(done, sample_rows(judged, experience, self.tokenizer, self.config.sample_rows))
            self.run.histograms(done, histograms(judged, experience))
        if metrics["update/skipped"] or metrics["objective/unscored"]:
            self.health.keep(done, judged, experience)
        few = select(judged.rollout, slice(JUDGED_ROWS))
        metrics |= {f"judge/{name}": float(judge(few).mean()) for name, judge in self.judges.items()}
        metrics |= self.health.see(done, metrics)
        row = self.run.log(done, metrics)
        if self.watch:
            self.watch(done, row)
        self._progress.update(done, row, partial(texts, judged.rollout, 0, self.tokenizer))
        self.health.check(done)
        self._done = done
        self._stopping = self.run.should_stop  # asked once: a signal after this is for the next step
        if done == self.config.total_steps and self.probes.due(done):
            self._keep_probes(done, self.probes.ask(done))
        if done % self.config.save_every == 0 or done == self.config.total_steps or self._stopping:
            self._save(done)
        self.trace.end(done, self.run)

    def _throughput(self) -> dict[str, float]:
        roles: dict[str, Callable[[], Any]] = {
            "generator": self.roles.generator.usage,
            "reward": self.roles.reward.usage,
            "reference": self.roles.reference.usage,
            "learner": self.roles.learner.usage,
        }
        usage = {role: ask() for role, ask in roles.items()}
        reduced = {(role, name): size for role, used in usage.items() for name, size in used.reduced.items()}
        for (role, name), size in reduced.items():
            if self._reduced.get((role, name)) != size:
                self.run.say(reduction(role, name, size))
        self._reduced = reduced
        elapsed = perf_counter() - self._started
        return {
            **{f"perf/tokens_per_second/{role}": used.tokens_per_second for role, used in usage.items()},
            **{f"perf/busy_seconds/{role}": used.seconds for role, used in usage.items()},
            **{f"perf/busy_share/{role}": used.seconds / elapsed / used.workers for role, used in usage.items()},
        }

    def _keep_probes(self, step: int, asked: Asked) -> None:
        """Wait for the probes, before the learner takes its next step, and have them written."""
        with self.run.time("probe"):
            judged = self.probes.gather(asked)
        kl_coef = raised(self._tracked["kl"].state_dict()["coef"], self.config.kl.rollback_factor, self.rollbacks)
        self.run.samples(step, self.probes.rows(judged, kl_coef), kind="probes")

    def save_what_is_done(self) -> None:
        """Save the last step that ended although the workers are given up, which can't be waited for.

        Batches that were sampled ahead of it are part of a checkpoint: where they are lost, the one before is the last.
        """
        with suppress(GaveUp, WorkerLost):
            if self._done > self._last_saved:
                self._save(self._done)
            self.run.sync()
        self.run.say(f"stopped after step {self._last_saved}, workers having died too often; the same command goes on")

    def go_back(self, diverged: Diverged) -> None:
        """Leave a course that has diverged, for the last healthy checkpoint; raises Diverged where that is the end."""
        self.health.go_back(self.store, diverged)

    def close(self) -> None:
        """Close what an algorithm that broke off has left open."""
        self._open.close()

    def _save(self, step: int) -> None:
        with self.run.time("save"):
            if self._saving:
                self._saving.result()  # the learner keeps one snapshot
            snapshot = self.learner.snapshot()
            tracked = {name: state.state_dict() for name, state in self._tracked.items()}
            self._saving = self.run.later(self._write, step, tracked, tuple(self._ahead), snapshot)

    def _write(
        self, step: int, tracked: dict[str, Any], ahead: Sequence[Shards[Rollout]], snapshot: Handle[None]
    ) -> None:
        """Write a checkpoint, when the batches that are being sampled ahead of it are there."""
        snapshot.result()
        batches = [[_tree(handle.result()) for handle in shards.handles] for shards in ahead]

        def fill(folder: Path) -> None:
            self.learner.write(folder)
            write_hf_tokenizer(folder, self.tokenizer, self.config.template)
            save_tree(folder / "run", {"step": step, "tracked": tracked})
            save_tree(folder / "ahead", batches)

        self.store.write(step, fill)
        self._last_saved = step


def _check_vocabulary(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """CheckpointError unless the checkpoint's vocabulary is the run's, which its batches and its policy speak."""
    if Tokenizer.load(checkpoint).fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"{checkpoint / 'vocab.json'}: its vocabulary is not that of this run's policy, which was replaced since; "
            "put the policy back that the run began with, or begin anew (--overwrite, or another --run)"
        )


def _tree(rollout: Rollout) -> dict[str, Any]:
    return {field.name: getattr(rollout, field.name) for field in fields(rollout)}


def _fresh(batches: list[list[dict[str, Any]]], step: int, limit: int) -> deque[Shards[Rollout]]:
    """Saved batches of ``step`` and the steps after it, up to one that would be staler than the limit of this run."""
    fresh: deque[Shards[Rollout]] = deque()
    for batch in batches:
        rows = [Rollout(**shard) for shard in batch]
        if step + len(fresh) - int(rows[0].policy_version[0]) > limit:
            break
        fresh.append(Shards(tuple(map(Done, rows))))
    return fresh
