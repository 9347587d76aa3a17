"""Before and after: two policies answer the same held-out prompts with the same random numbers.

A judge that no training touches rates them, with the reward model's score, the KL from the baseline, length,
EOS rate and diversity beside it: a score alone proves nothing (Huang et al. 2024, "The N+ Implementation
Details").  The KL of a sequence is the sum of log p_policy - log p_baseline over the tokens of the policy's
own sample, in nats, at the sampling temperature.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.config import EvaluateConfig, repository_path
from rlhf_ray.console import say, table
from rlhf_ray.data.prompt_set import tokenise_prompts
from rlhf_ray.data.readers import read_prompts
from rlhf_ray.data.rows import PromptRow
from rlhf_ray.evaluation.answers import Answers, Panel
from rlhf_ray.evaluation.intervals import intervals, wilson
from rlhf_ray.evaluation.judges import Judge, find_judge
from rlhf_ray.generation.load import find_device, load_policy_with_tokenizer
from rlhf_ray.models.folders import model_folder
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.hf_weights import load_reward_model
from rlhf_ray.tokenizer import Tokenizer, find_template


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """How often the judge prefers the policy; a tie is half a win."""

    rate: float
    low: float
    """Ends of Wilson's 95 % interval; ties make it wider than need be."""
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Both policies' answers to the same prompts."""

    prompts: tuple[PromptRow, ...]
    cut: int
    """Prompts that lost tokens on the left because they were too long."""
    baseline: Answers
    policy: Answers

    @property
    def win_rate(self) -> WinRate | None:
        """The policy's win-rate over the baseline; None without a judge."""
        if self.policy.judged is None or self.baseline.judged is None:
            return None
        return win_rate(self.policy.judged, self.baseline.judged)


def win_rate(policy: Sequence[float], baseline: Sequence[float]) -> WinRate:
    """Share of pairs that the policy wins, ties half, with the score interval of Wilson (1927)."""
    p = statistics.mean((a > b) + (a == b) / 2 for a, b in zip(policy, baseline, strict=True))
    low, high = wilson(p, len(policy))
    return WinRate(rate=p, low=low, high=high)


def pick(rows: Sequence[PromptRow], count: int) -> list[PromptRow]:
    """At most ``count`` rows, evenly spread over the file, so that a sorted file gives every kind."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def compare(config: EvaluateConfig, judge: Judge | None = None) -> Comparison:
    """Sample both policies on held-out prompts and rate them; ``judge`` overrides the configured one.

    Raises ValueError when a model or file is missing, or vocabularies or contexts don't fit each other.
    """
    device = find_device(config.device)
    judge = judge or find_judge(config.judge)
    policy, tokenizer, recorded = load_policy_with_tokenizer(config.policy, device=device)
    baseline, other, _ = load_policy_with_tokenizer(config.baseline, device=device, field="baseline")
    check_same_vocabulary(tokenizer, other, field="baseline", path=config.baseline)
    reward_model = _load_reward_model(config, tokenizer, device)
    models = [policy, baseline] if reward_model is None else [policy, baseline, reward_model.trunk]
    prompts = tokenise_prompts(
        pick(read_prompts(repository_path(config.prompts)), config.max_prompts),
        tokenizer,
        find_template(config.template or recorded or "chat"),
        max_length=_prompt_length(config, min(model.config.n_positions for model in models)),
        long_prompts="cut",
    )
    panel = Panel(
        config=config,
        tokenizer=tokenizer,
        prompts=prompts,
        baseline=baseline,
        reward_model=reward_model,
        judge=judge,
    )
    return Comparison(prompts=prompts.rows, cut=prompts.cut, baseline=panel.rate(baseline), policy=panel.rate(policy))


def check_same_vocabulary(policy: Tokenizer, other: Tokenizer, *, field: str, path: Path) -> None:
    """ValueError unless both tokenizers give the same ids."""
    if policy.fingerprint != other.fingerprint:
        raise ValueError(f"{field} = {path}: it has another vocabulary than policy; both must share one")


def _load_reward_model(config: EvaluateConfig, tokenizer: Tokenizer, device: torch.device) -> ValueModel | None:
    if config.reward_model is None:
        return None
    folder = model_folder(config.reward_model, field="reward_model")
    check_same_vocabulary(tokenizer, Tokenizer.load(folder), field="reward_model", path=config.reward_model)
    return load_reward_model(folder, device=device).eval().requires_grad_(False)


def _prompt_length(config: EvaluateConfig, context: int) -> int:
    """Tokens that a prompt may have in the smallest context; ValueError when the response leaves it none."""
    if config.response_length >= context:
        raise ValueError(
            f"response_length = {config.response_length} leaves no room for a prompt in a context of "
            f"{context} tokens; lower it"
        )
    return min(config.prompt_length, context - config.response_length)


LABELS = {
    "judge": "judge, mean",
    "reward": "reward model, mean score",
    "kl": "KL from baseline, nats a sequence",
    "length": "response length, tokens",
    "eos_rate": "ended by EOS",
    "distinct_2": "distinct-2",
}


def summary(answers: Answers) -> dict[str, float]:
    """The means of one policy's answers by the names of LABELS; what was not measured is left out."""
    values = {
        "judge": None if answers.judged is None else statistics.fmean(answers.judged),
        "reward": None if answers.scores is None else statistics.fmean(answers.scores),
        "kl": statistics.fmean(answers.kl),
        "length": statistics.fmean(answers.lengths),
        "eos_rate": statistics.fmean(answers.finished),
        "distinct_2": answers.distinct_2,
    }
    return {name: value for name, value in values.items() if value is not None}


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything that was measured, and every pair of samples."""
    win = comparison.win_rate
    return {
        "prompts": len(comparison.prompts),
        "prompts_cut": comparison.cut,
        "win_rate": None if win is None else {"rate": win.rate, "low": win.low, "high": win.high},
        "baseline": summary(comparison.baseline),
        "policy": summary(comparison.policy),
        "intervals": intervals(comparison.baseline, comparison.policy),
        "samples": sample_pairs(comparison),
    }


def sample_pairs(comparison: Comparison) -> list[dict[str, str]]:
    """Each prompt's last message with both answers."""
    rows = zip(comparison.prompts, comparison.baseline.texts, comparison.policy.texts, strict=True)
    return [{"prompt": row.prompt[-1].content, "baseline": before, "policy": after} for row, before, after in rows]


def show(comparison: Comparison, config: EvaluateConfig) -> None:
    """Print the table and ``config.examples`` pairs of samples; write everything to ``config.output`` if set."""
    before, after = summary(comparison.baseline), summary(comparison.policy)
    title = f"Before and after on {len(comparison.prompts)} held-out prompts"
    if comparison.cut:
        title += f" ({comparison.cut} of them cut from the left)"
    rows = [[label, before[name], after[name]] for name, label in LABELS.items() if name in before]
    table(title, ["", "baseline", "policy"], rows)
    if comparison.win_rate is not None:
        win = comparison.win_rate
        say(f"judge's win-rate of the policy: {win.rate:.3f}, 95 % interval {win.low:.3f} to {win.high:.3f}")
    if config.examples:
        pairs = sample_pairs(comparison)[: config.examples]
        cells = [[" ".join(text.split()) for text in pair.values()] for pair in pairs]
        table("Samples", ["prompt", "baseline", "policy"], cells)
    if config.output is not None:
        write_json(config.output, as_json(comparison))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result to a file, whose folder is made when missing."""
    output = repository_path(path)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    say(f"wrote {output}")
