"""From what a run needs and what there is to a configuration that fits, or to one sentence that says what would.

What changes results by rounding alone is chosen: of all combinations that fit the one that is thought to cost the
least time.  What changes them more (number types, LoRA, packed weights, a smaller model) is proposed and never chosen.

Left out on purpose: larger micro-batches than asked for, and times that are measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlhf_ray.config import PPOConfig
from rlhf_ray.generation.slots import ROW_BLOCK
from rlhf_ray.models.gpt2 import PRESETS, preset
from rlhf_ray.planning.needs import Device, Prediction
from rlhf_ray.planning.predict import predict
from rlhf_ray.planning.roles import Models
from rlhf_ray.planning.sizes import parameters

Change = Mapping[str, Any]
"""New values by dotted name."""

HALVING = 0.03
"""What half a micro-batch is thought to cost of a step's time."""
FEWER_ROWS = 0.1
"""The same of half as many rows in generation's cache."""
SAVERS: dict[str, tuple[Any, float]] = {"memory.activation_checkpointing": (True, 0.25)}
CARD_SAVERS = SAVERS | {
    "weight_sync": ("store", 0.01),
    "memory.sleep": (True, 0.02),
    "memory.offload_optimizer": (True, 0.1),
}
"""What each saver is set to, and what it is thought to cost; those beyond ``SAVERS`` are of no use on a CPU."""

HALF = {"ppo.dtype": "bfloat16", "generation.dtype": "bfloat16", "memory.frozen": "bfloat16"}
PROPOSALS: tuple[Change, ...] = (
    {"rollout_device": "cpu"},
    HALF,
    HALF | {"memory.optimizer_bits": 8},
    {"lora.rank": 16},
    HALF | {"lora.rank": 16},
    HALF | {"lora.rank": 16, "memory.frozen": "int8"},
)
"""What results change by, the least first."""
ON_CARDS = ("rollout_device", "ppo.dtype")
"""Proposals that save nothing on a CPU."""
KINDS = ("float32", "bfloat16", "int8", "int4")
"""Of ``memory.frozen``, each smaller than the one before."""
MOST = 3
"""Proposals of a refusal, beside a smaller model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A configuration that fits."""

    config: PPOConfig
    prediction: Prediction
    budget: int
    """Bytes that there are."""
    chosen: Change
    """What was changed to fit, by dotted name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is planned for."""

    config: PPOConfig
    models: Models
    device: Device
    budget: int
    """Bytes that there are."""
    longest_prompt: int = 0
    """Tokens, where they are known."""

    def predicted(self, change: Change) -> Prediction:
        """What it needs with this change."""
        config = changed(self.config, change)
        return predict(config, self.models, self.device, longest_prompt=self.longest_prompt)

    def fitting(self) -> Plan | None:
        """The cheapest choice that fits; None when none does."""
        for _, change in sorted(self._choices(), key=lambda choice: choice[0]):
            prediction = self.predicted(change)
            if prediction.total <= self.budget:
                config = changed(self.config, change)
                return Plan(config=config, prediction=prediction, budget=self.budget, chosen=change)
        return None

    def smallest(self) -> Prediction:
        """What it needs with every saver that leaves the results alone."""
        return min((self.predicted(change) for _, change in self._choices()), key=lambda found: found.total)

    def _choices(self) -> list[tuple[float, Change]]:
        """Every combination of choices that leave the results alone, and what it is thought to cost."""
        config = self.config
        row = config.generation.prompt_length + config.generation.response_length
        by_tokens = config.ppo.micro_batch_tokens > 0
        name, least = ("ppo.micro_batch_tokens", row) if by_tokens else ("ppo.micro_batch_size", 1)
        options = [_halvings(name, least, HALVING, config)]
        options.append(_halvings("generation.max_rows", ROW_BLOCK, FEWER_ROWS, config))
        for name, (value, cost) in (CARD_SAVERS if self.device == "cuda" else SAVERS).items():
            saver: list[tuple[float, Change]] = [(cost, {name: value})]
            options.append([(0.0, {})] + saver * (value_of(config, name) != value))
        combinations = itertools.product(*options)
        return [(sum(cost for cost, _ in parts), _joined(change for _, change in parts)) for parts in combinations]


def plan(run: Run, *, what: str) -> Plan:
    """The configuration that fits; ValueError in one sentence, naming what would, when none does.

    ``what`` says whose memory the budget is: "and gpu_memory is 6GB".
    """
    found = run.fitting()
    if found:
        return found
    ways = [*itertools.islice(proposals(run), MOST), *smaller_models(run)]
    would = f"what fits gives other results: {'; '.join(ways)}" if ways else "no shipped model fits either"
    least = gigabytes(run.smallest().total)
    raise ValueError(f"this run needs {least} GB in the smallest form that gives its results, {what}; {would}")


def proposals(run: Run) -> Iterator[str]:
    """Changes of the results with which the run fits, as flags and what it then needs; those that add to one are left
    out.
    """
    found: list[set[str]] = []
    for wanted in PROPOSALS:
        change = {name: value for name, value in wanted.items() if _saves(run, name, value)}
        flags = [flag(name, value) for name, value in change.items()]
        if not flags or any(known <= set(flags) for known in found):
            continue
        fitting = replace(run, config=changed(run.config, change)).fitting()
        if fitting:
            found.append(set(flags))
            yield f"{' '.join(flags)} fits in {gigabytes(fitting.prediction.total)} GB"


def smaller_models(run: Run) -> Iterator[str]:
    """The largest shipped shape below the policy's that fits, if there is one."""
    policy, generation = run.models.policy, run.config.generation
    for name in reversed(PRESETS):
        shape = preset(name, policy.vocab_size)
        too_short = shape.n_positions < generation.prompt_length + generation.response_length
        if too_short or parameters(shape) >= parameters(policy):
            continue
        rewards, critic = (shape,) * len(run.models.rewards), run.models.critic and shape
        models = replace(run.models, policy=shape, rewards=rewards, critic=critic)
        fitting = replace(run, models=models).fitting()
        if fitting:
            yield f"the model {name} fits in {gigabytes(fitting.prediction.total)} GB"
            return


def changed(config: PPOConfig, change: Change) -> PPOConfig:
    """The configuration with other values; nothing is checked again."""
    for name, value in change.items():
        section, _, own = name.rpartition(".")
        if section:
            part = getattr(config, section).model_copy(update={own: value})
            config = config.model_copy(update={section: part})
        else:
            config = config.model_copy(update={own: value})
    return config


def value_of(config: PPOConfig, name: str) -> Any:
    """The value of a dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def flag(name: str, value: Any) -> str:
    """A value as it is given on the command line."""
    return f"--{name.replace('_', '-')} {value}"


def gigabytes(amount: int) -> str:
    """Billions of bytes."""
    return f"{amount / 1e9:.1f}"


def _saves(run: Run, name: str, value: Any) -> bool:
    """Whether a proposal asks for less than there is."""
    now = value_of(run.config, name)
    if name == "memory.frozen":
        return KINDS.index(value) > KINDS.index(now)
    if name == "lora.rank":
        return not now
    return now != value and (run.device == "cuda" or name not in ON_CARDS)


def _halvings(name: str, least: int, cost: float, config: PPOConfig) -> list[tuple[float, Change]]:
    """A number as it is, and halved as often as it stays above the least."""
    value = value_of(config, name) or config.generation.shard_size
    choices: list[tuple[float, Change]] = [(0.0, {})]
    while value > least:
        value = max(least, value // 2)
        choices.append((cost * len(choices), {name: value}))
    return choices


def _joined(changes: Iterator[Change]) -> Change:
    return {name: value for change in changes for name, value in change.items()}
