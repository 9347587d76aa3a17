"""The learner: policy, critic and optimiser, and the gradient steps of PPO.

``evaluate`` takes the old log-probabilities and values with the learner's own kernels, so that the ratio of the first
mini-batch is one; ``update`` runs epochs x shuffled mini-batches x micro-batches.  Every micro-batch divides by its
mini-batch's own denominator, so the gradient does not depend on how a mini-batch is split (Huang et al., "The N+
Implementation Details of RLHF with PPO").  Several learners share each mini-batch's rows and add up what they find
(``workers/ranks.py``); all are given the same calls, and the first one answers and writes.

Left out on purpose: advantages, which are the algorithm's; random state, because the shuffle is keyed by (seed, step,
epoch) and nothing else is drawn.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.checkpoint import load_tree, save_tree
from rlhf_ray.config import PPO
from rlhf_ray.models.lora import published
from rlhf_ray.models.scoring import policy_logprobs
from rlhf_ray.ops.masked import AGGREGATIONS
from rlhf_ray.ops.schedules import SCHEDULES
from rlhf_ray.rundir.fit import check_optimiser
from rlhf_ray.shortage import micro_batch, named
from rlhf_ray.types import Evaluation, Experience, Rollout, Usage, Weights, select
from rlhf_ray.workers.direct import Notice, make_sender
from rlhf_ray.workers.lending import Lent, lend_model
from rlhf_ray.workers.meter import Meter, give_back
from rlhf_ray.workers.optimiser import adamw
from rlhf_ray.workers.policy_critic import PolicyCritic
from rlhf_ray.workers.ppo_loss import over_mini_batches, ppo_loss
from rlhf_ray.workers.ranks import Meeting, Ranks
from rlhf_ray.workers.sharding import join_in, load_whole_optimiser
from rlhf_ray.workers.snapshot import copy_of_state
from rlhf_ray.workers.weights import export_weights

Opinions = Sequence[Tensor | None]
"""Tensors (b, t) of a micro-batch; None is one that was not asked for."""
RATIO_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""How far a ratio of the first mini-batch may be from one: rounding of the same sums in other groupings."""


class LearnerWorker:
    """Takes the gradient steps."""

    @named("learner", "start")
    def __init__(
        self,
        build: Callable[[], PolicyCritic],
        config: PPO,
        *,
        seed: int,
        total_steps: int,
        response_length: int,
        rollout_dtype: torch.dtype,
        threads: int,
        sharding: str = "none",
        optimizer_bits: int = 32,
        offload_optimizer: bool = False,
        direct_versions: int = 0,
        auto_micro_batch: bool = False,
        meeting: Meeting | None = None,
    ) -> None:
        """``build`` makes policy and critic in the worker's own process; at a ``meeting`` it finds the other ranks.

        0 ``threads`` share the cores out among the ranks of a node.  Weights go out directly where so many newest
        ``direct_versions`` are kept, and as a value where none are.
        """
        self.model = model = build()
        self.ranks = Ranks.join(meeting, model.device) if meeting else Ranks()
        self.sharded = sharding == "fsdp2"
        if self.sharded:
            model.shard()
        self.published = published(model.policy)
        self.config = config
        rows, tokens = config.micro_batch_size, config.micro_batch_tokens
        self.portion = micro_batch(rows, tokens, section="ppo.", auto=auto_micro_batch)
        self.seed = seed
        self.total_steps = total_steps
        self.response_length = response_length
        self.rollout_dtype = rollout_dtype
        self.step = 0
        self._snapshot: tuple[PolicyCritic, dict[str, Any]] | None = None
        self.meter = Meter(threads or max(1, (os.cpu_count() or 1) // self.ranks.neighbours))
        self.sender = make_sender(direct_versions, model.device, threads=self.meter.threads)
        self.optimiser = adamw(
            model.parameter_groups(config.lr, config.value_lr or config.lr, config.weight_decay),
            lr=config.lr,
            eps=config.adam_eps,
            betas=(0.9, 0.999),
            bits=optimizer_bits,
            offload=offload_optimizer,
        )
        self._base_lrs = [group["lr"] for group in self.optimiser.param_groups]

    def evaluate(self, rollout: Rollout) -> Evaluation:
        """Old log-probabilities, entropies and values of a shard, (B, T) each, on the CPU."""
        logprobs, entropy, values = self._score(rollout, partial(self.model, with_entropy=True), count=3)
        return Evaluation(old_logprobs=logprobs, entropy=entropy, values=values)

    def logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probabilities (B, T) of a shard under the policy without its adapters, on the CPU.

        Taken as ``evaluate`` takes the policy's: adapters that have learned nothing give the same bits.
        """
        model, adapters = self.model, self.model.adapters
        assert adapters, "where every weight learns nothing is left of the policy that began"
        score = partial(policy_logprobs, adapters.base, temperature=model.temperature, dtype=model.dtype)
        return self._score(rollout, lambda micro: (score(micro),), count=1)[0]

    @torch.no_grad()
    def _score(self, rollout: Rollout, score: Callable[[Rollout], Opinions], *, count: int) -> list[Tensor]:
        """What ``score`` says of each micro-batch, ``count`` tensors (b, t), for a whole shard: (B, T) each."""
        with self.meter.busy(), named("learner", "judge", self.portion):
            self._count(int(rollout.attention_mask.sum()))
            found = [torch.zeros(rollout.tokens.shape, device=self.model.device) for _ in range(count)]

            def fill() -> None:
                for rows, micro in self._micro_batches(rollout):
                    for whole, part in zip(found, score(micro), strict=True):
                        assert part is not None
                        whole[rows.to(self.model.device), : part.shape[1]] = part[: len(rows)]

            self.portion.attempt(fill, lambda: rollout.attention_mask.sum(1))
            if self.sharded:
                self.model.rest()
            return [self.ranks.sum(whole).cpu() for whole in found]

    def update(self, experience: Experience) -> dict[str, float]:
        """Learn from one batch; returns the metrics of the update, averaged over its mini-batches.

        One whose loss or gradient is not finite is skipped and counted: the optimiser never sees it.  Raises
        ValueError, before the first optimiser step, when its mini-batch's ratio is not one.
        """
        with self.meter.busy(), named("learner", "learn", self.portion):
            factor = SCHEDULES[self.config.schedule](self.step, self.total_steps, self.config.warmup_fraction)
            for group, base in zip(self.optimiser.param_groups, self._base_lrs, strict=True):
                group["lr"] = base * factor
            taken: list[dict[str, float]] = []
            skipped: list[dict[str, float]] = []
            for mini in self._mini_batches(experience):
                metrics, finite = self._mini_batch_step(mini, first=not taken)
                (taken if finite else skipped).append(metrics)
                limit = self.config.target_update_kl
                if limit and metrics["policy/update_kl"] > limit:
                    break
            self.step += 1
            self._count(int(experience.rollout.attention_mask.sum()) * self.config.epochs)
            return {
                **over_mini_batches(taken or skipped),
                "policy/optimiser_steps": float(len(taken)),
                "update/skipped": float(len(skipped)),
                "policy/lr": self.config.lr * factor,
            }

    def _mini_batches(self, experience: Experience) -> Iterator[Experience]:
        """Shuffled rows, ``mini_batch_size`` at a time, over all epochs; within one, rows of like length are close."""
        lengths = experience.rollout.attention_mask.sum(1)  # (B,)
        for epoch in range(self.config.epochs):
            shuffle = np.random.default_rng([self.seed, self.step, epoch])
            order = torch.from_numpy(shuffle.permutation(len(experience)))
            for rows in order.split(self.config.mini_batch_size):
                yield select(experience, rows[lengths[rows].argsort(stable=True)])

    def _mini_batch_step(self, mini: Experience, *, first: bool) -> tuple[dict[str, float], bool]:
        """One optimiser step, left out where loss or gradient is not finite, and whether it was taken; metrics of the
        mini-batch before the step.

        Every rank has the same sums and norms, so all take the step or none does.
        """
        forget = partial(self.optimiser.zero_grad, set_to_none=True)
        lengths = partial(mini.rollout.attention_mask.sum, 1)
        totals, extremes = self.portion.attempt(partial(self._gradient, mini), lengths, undo=forget)
        totals, (largest, error) = self._over_ranks(totals, extremes)
        self._sum_gradients()
        norms = self.model.clip_gradients(self.config.max_grad_norm, self.ranks)
        finite = all(map(math.isfinite, (*totals.values(), *norms.values())))
        if finite:
            if first:
                self._check_first_ratio(error)
            with named("learner", "optimiser step"):
                self.optimiser.step()
        forget()
        return {**totals, **norms, "val/ratio_max": largest, "val/first_ratio_error": error}, finite

    def _gradient(self, mini: Experience) -> tuple[dict[str, float], list[tuple[float, float]]]:
        """Add this rank's share of a mini-batch's gradient up; its sums, and the extremes of its micro-batches."""
        mask = mini.rollout.response_mask
        denominator = AGGREGATIONS[self.config.aggregation].count(mask, self.response_length)
        totals: dict[str, float] = {}
        extremes: list[tuple[float, float]] = []
        for _, micro in self._micro_batches(mini):
            loss, terms, extreme = ppo_loss(self.model, self.config, micro, denominator, mask.sum())
            loss.backward()
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + float(value)
            extremes.append(extreme)
        return totals, extremes

    def _micro_batches(self, batch: Any) -> Iterator[tuple[Tensor, Any]]:
        return self.ranks.micro_batches(batch, self.portion.rows, self.portion.tokens)

    def _over_ranks(
        self, totals: dict[str, float], extremes: list[tuple[float, float]]
    ) -> tuple[dict[str, float], list[float]]:
        """Sums of ``totals`` and maxima of ``extremes`` over all ranks."""
        largest = torch.tensor(extremes).amax(0)  # NaN stays NaN, unlike with max()
        table = self.ranks.gather([*totals.values(), *largest.tolist()], self.model.device)  # (ranks, n)
        sums = table[:, : len(totals)].sum(0).tolist()
        return dict(zip(totals, sums, strict=True)), table[:, len(totals) :].amax(0).tolist()

    def _sum_gradients(self) -> None:
        """Add whole gradients up over the ranks; those of sharded parameters were, in the backward pass."""
        if not self.sharded:
            self.ranks.sum_gradients(p for group in self.optimiser.param_groups for p in group["params"])

    def _check_first_ratio(self, error: float) -> None:
        limit = RATIO_TOLERANCE[self.model.dtype]
        if not error <= limit:
            self.optimiser.zero_grad(set_to_none=True)
            raise ValueError(
                f"the first mini-batch's ratio is {error:.3g} away from one (allowed: {limit}): the experience was not "
                "evaluated with these weights, or dropout is on; refusing to train"
            )

    @named("learner", "publish")
    def weights(self, policy_version: int, meeting: Meeting | None = None) -> Weights | Notice | None:
        """What a policy version is made of, as one flat buffer; None from all ranks but the first.

        That is the policy in the rollout workers' type, or its adapters alone, in float32.  Where weights go out
        directly, they are sent to all who are at the ``meeting``, and this is a notice.
        """
        if self.ranks.first:
            dtype = torch.float32 if self.model.adapters else self.rollout_dtype
            if self.sender:
                return self.sender.publish(self.published, policy_version, dtype, meeting)
            return export_weights(self.published, policy_version, dtype, threads=self.meter.threads)
        join_in(self.published.parameters())
        return None

    def kept_weights(self, policy_version: int) -> Weights:
        """Weights that went out directly, for somebody whom they did not reach; beside other work."""
        assert self.sender
        return self.sender.kept(policy_version)

    def lend(self) -> Lent | None:
        """Where others on its GPU can read the policy without its adapters; None without either."""
        return lend_model(self.model.adapters.base) if self.model.adapters else None

    @named("learner", "save")
    def snapshot(self) -> None:
        """Keep a copy of policy, critic, optimiser and step as they are now, for ``write``."""
        if self.ranks.first or self.sharded:
            state = {"step": self.step, "optimiser": copy_of_state(self.optimiser.state_dict())}
            self._snapshot = self.model.snapshot(), state

    def write(self, folder: Path) -> None:
        """Write the newest snapshot into a checkpoint's folder; beside other work, as it touches nothing else.

        The first rank's alone; any number of ranks, sharded or not, writes and reads the same.
        """
        assert self._snapshot, "there is no snapshot to write"
        (model, state), self._snapshot = self._snapshot, None
        model.save(folder)
        save_tree(folder / "learner", state)

    @named("learner", "start")
    def load(self, folder: Path) -> None:
        """Take over what ``write`` wrote."""
        self.model.load(folder)
        state = load_tree(folder / "learner")
        self.step = state["step"]
        check_optimiser(self.optimiser, state["optimiser"], folder / "learner.safetensors")
        load_whole_optimiser(self.optimiser, state["optimiser"])

    def _count(self, tokens: int) -> None:
        """Add to the tokens worked on, which all ranks share."""
        if self.ranks.first:
            self.meter.count(tokens)

    def sleep(self) -> None:
        """Give back what is kept for the next call."""
        give_back()

    def usage(self) -> Usage:
        """Tokens evaluated and learned from, and seconds spent, since the last call."""
        return self.meter.take(self.portion.reduced)

    def __repr__(self) -> str:
        return f"LearnerWorker(step={self.step}, {self.model.device})"
