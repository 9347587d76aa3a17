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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.checkpoint import load_tree, save_tree
from rlhf_ray.config import PPO
from rlhf_ray.ops.losses import max_ratio, policy_diagnostics, policy_loss_terms, value_loss_terms
from rlhf_ray.ops.masked import AGGREGATIONS, masked_sum
from rlhf_ray.ops.schedules import SCHEDULES
from rlhf_ray.rundir.fit import check_optimiser
from rlhf_ray.types import Evaluation, Experience, Rollout, Usage, Weights, select
from rlhf_ray.workers.meter import Meter
from rlhf_ray.workers.policy_critic import PolicyCritic
from rlhf_ray.workers.ranks import Meeting, Ranks
from rlhf_ray.workers.sharding import join_in, load_whole_optimiser
from rlhf_ray.workers.snapshot import copy_of_state
from rlhf_ray.workers.weights import export_weights

RATIO_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""How far a ratio of the first mini-batch may be from one: rounding of the same sums in other groupings."""


class LearnerWorker:
    """Takes the gradient steps."""

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
        meeting: Meeting | None = None,
    ) -> None:
        """``build`` makes policy and critic in the worker's own process; at a ``meeting`` it finds the other ranks.

        0 ``threads`` share the cores out among the ranks of a node.
        """
        self.model = model = build()
        self.ranks = Ranks.join(meeting, model.device) if meeting else Ranks()
        self.sharded = sharding == "fsdp2"
        if self.sharded:
            model.shard()
        self.config = config
        self.seed = seed
        self.total_steps = total_steps
        self.response_length = response_length
        self.rollout_dtype = rollout_dtype
        self.step = 0
        self._snapshot: tuple[PolicyCritic, dict[str, Any]] | None = None
        self.meter = Meter(threads or max(1, (os.cpu_count() or 1) // self.ranks.neighbours))
        self.optimiser = torch.optim.AdamW(
            model.parameter_groups(config.lr, config.value_lr or config.lr, config.weight_decay),
            eps=config.adam_eps,
            betas=(0.9, 0.999),
            fused=True,
        )
        self._base_lrs = [group["lr"] for group in self.optimiser.param_groups]

    @torch.no_grad()
    def evaluate(self, rollout: Rollout) -> Evaluation:
        """Old log-probabilities, entropies and values of a shard, (B, T) each, on the CPU."""
        with self.meter.busy():
            self._count(int(rollout.attention_mask.sum()))
            device = self.model.device
            logprobs, entropy, values = (torch.zeros(rollout.tokens.shape, device=device) for _ in range(3))
            for rows, micro in self._micro_batches(rollout):
                for found, part in zip((logprobs, entropy, values), self.model(micro, with_entropy=True), strict=True):
                    assert part is not None
                    found[rows.to(device), : part.shape[1]] = part[: len(rows)]
            if self.sharded:
                self.model.rest()
            logprobs, entropy, values = (self.ranks.sum(found).cpu() for found in (logprobs, entropy, values))
            return Evaluation(old_logprobs=logprobs, entropy=entropy, values=values)

    def update(self, experience: Experience) -> dict[str, float]:
        """Learn from one batch; returns the metrics of the update, averaged over its mini-batches.

        Raises ValueError, before the first optimiser step, when the first mini-batch's ratio is not one, and before
        any, when its gradient is not finite.
        """
        with self.meter.busy():
            factor = SCHEDULES[self.config.schedule](self.step, self.total_steps, self.config.warmup_fraction)
            for group, base in zip(self.optimiser.param_groups, self._base_lrs, strict=True):
                group["lr"] = base * factor
            history: list[dict[str, float]] = []
            for mini in self._mini_batches(experience):
                history.append(self._mini_batch_step(mini, first=not history))
                limit = self.config.target_update_kl
                if limit and history[-1]["policy/update_kl"] > limit:
                    break
            self.step += 1
            self._count(int(experience.rollout.attention_mask.sum()) * self.config.epochs)
            metrics = {name: sum(h[name] for h in history) / len(history) for name in history[0]}
            return {
                **metrics,
                "val/ratio_max": max(h["val/ratio_max"] for h in history),
                "val/first_ratio_error": history[0]["val/first_ratio_error"],
                "policy/optimiser_steps": float(len(history)),
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

    def _mini_batch_step(self, mini: Experience, *, first: bool) -> dict[str, float]:
        """One optimiser step; metrics of the mini-batch before the step."""
        mask = mini.rollout.response_mask
        aggregate = AGGREGATIONS[self.config.aggregation]
        denominator = aggregate.count(mask, self.response_length)
        totals: dict[str, float] = {}
        extremes: list[tuple[float, float]] = []
        for _, micro in self._micro_batches(mini):
            loss, terms, extreme = self._losses(micro, denominator, mask.sum())
            loss.backward()
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + float(value)
            extremes.append(extreme)
        totals, (largest, error) = self._over_ranks(totals, extremes)
        if first:
            self._check_first_ratio(error)
        self._sum_gradients()
        norms = self.model.clip_gradients(self.config.max_grad_norm, self.ranks)
        self._check_gradient(norms)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return {**totals, **norms, "val/ratio_max": largest, "val/first_ratio_error": error}

    def _micro_batches(self, batch: Any) -> Iterator[tuple[Tensor, Any]]:
        return self.ranks.micro_batches(batch, self.config.micro_batch_size, self.config.micro_batch_tokens)

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

    def _losses(
        self, micro: Experience, denominator: Tensor, token_count: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], tuple[float, float]]:
        """This micro-batch's share of the mini-batch's loss and metrics; its largest ratio and distance from one."""
        config, device = self.config, self.model.device
        mask = micro.rollout.response_mask.to(device)
        aggregate = AGGREGATIONS[config.aggregation]
        share = denominator.to(device)
        logprobs, entropy, values = self.model(micro.rollout, with_entropy=config.entropy_coef > 0)
        terms = policy_loss_terms(
            logprobs,
            micro.old_logprobs.to(device),
            micro.advantages.to(device),
            mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            importance_weights=None if micro.importance_weights is None else micro.importance_weights.to(device),
        )
        assert micro.values is not None and micro.returns is not None
        value_terms = value_loss_terms(
            values,
            micro.values.to(device),
            micro.returns.to(device),
            mask,
            clip_range=config.value_clip,
        )
        policy_loss = aggregate(terms.loss, mask, denominator=share)
        value_loss = aggregate(value_terms.loss, mask, denominator=share)
        total = policy_loss + config.value_coef * value_loss
        if entropy is not None:
            total = total - config.entropy_coef * aggregate(entropy, mask, denominator=share)
        tokens = token_count.to(device)
        metrics = {
            "loss/policy_avg": policy_loss.detach(),
            "loss/value_avg": value_loss.detach(),
            "val/clipfrac_avg": masked_sum(value_terms.clipped.float(), mask) / tokens,
            **policy_diagnostics(terms, mask, denominator=tokens),
        }
        distance = float((terms.log_ratio.exp() - 1).abs().max())
        return total, metrics, (float(max_ratio(terms, mask)), distance)

    def _check_first_ratio(self, error: float) -> None:
        limit = RATIO_TOLERANCE[self.model.dtype]
        if not error <= limit:
            self.optimiser.zero_grad(set_to_none=True)
            raise ValueError(
                f"the first mini-batch's ratio is {error:.3g} away from one (allowed: {limit}): the experience was not "
                "evaluated with these weights, or dropout is on; refusing to train"
            )

    def _check_gradient(self, norms: dict[str, float]) -> None:
        if not all(math.isfinite(norm) for norm in norms.values()):
            self.optimiser.zero_grad(set_to_none=True)
            raise ValueError(
                f"step {self.step}: the gradient is not finite ({norms}); the weights are as they were before it: "
                "resume from the newest checkpoint with a lower ppo.lr"
            )

    def weights(self, policy_version: int) -> Weights | None:
        """The policy as one flat buffer in the rollout workers' type; None from all ranks but the first."""
        if self.ranks.first:
            return export_weights(self.model.policy, policy_version, self.rollout_dtype, threads=self.meter.threads)
        join_in(self.model.policy.parameters())
        return None

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

    def usage(self) -> Usage:
        """Tokens evaluated and learned from, and seconds spent, since the last call."""
        return self.meter.take()

    def __repr__(self) -> str:
        return f"LearnerWorker(step={self.step}, {self.model.device})"
