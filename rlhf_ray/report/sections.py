"""The parts of the page that are tables: what was run, evaluation, findings, memory, configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rlhf_ray.config import Config, PPOConfig, PretrainConfig, RewardModelConfig, SFTConfig
from rlhf_ray.doctor import Finding, diagnose
from rlhf_ray.report.record import RunRecord
from rlhf_ray.report.text import difference, duration, escape, number, percent, rows, settings_of

CONFIGS: dict[str, type[Config]] = {
    "ppo": PPOConfig,
    "sft": SFTConfig,
    "reward_model": RewardModelConfig,
    "pretrain": PretrainConfig,
}

MEASURES = {
    "judge": "judge, mean",
    "reward": "reward model, mean score",
    "kl": "KL from the baseline, nats a response",
    "length": "response length, tokens",
    "eos_rate": "ended by EOS",
    "distinct_2": "distinct-2",
}


def facts(record: RunRecord) -> str:
    """When, how long, how large and on what."""
    found: dict[str, str] = {}
    if record.log:
        found["begun"] = f"{record.log[0][0]:%d %B %Y, %H:%M %Z}"
    found["steps"] = f"{record.steps:,} in {duration(record.seconds)}"
    if record.stage == "ppo":
        batch = record.config["batch_size"]
        found["responses"] = f"{record.steps * batch:,}, {batch:,} a step"
    if "n_layer" in record.model:
        found["model"] = _size(record.model)
    found |= {name: str(record.config[name]) for name in ("policy", "prompts") if record.config.get(name)}
    found |= {name: value for name, value in record.machine.items() if value != "none"}
    return f"<h2>What was run</h2>{rows([escape(n), escape(v)] for n, v in found.items())}"


def _size(model: dict[str, Any]) -> str:
    """Layers, width, heads and parameters of a GPT-2."""
    layers, width = model["n_layer"], model["n_embd"]
    parameters = (
        (model["vocab_size"] + model["n_positions"]) * width + layers * (12 * width**2 + 13 * width) + 2 * width
    )
    return (
        f"GPT-2, {layers} layers of {width}, {model['n_head']} heads, {model['vocab_size']:,} tokens: "
        f"{parameters:,} parameters"
    )


def findings(record: RunRecord) -> list[Finding]:
    """What the doctor says; most of its rules are about PPO, and silent about other stages."""
    return diagnose(record.metrics)


def warnings(records: Sequence[RunRecord]) -> str:
    """Every finding with its likely cause and what may help."""
    items = []
    for record in records:
        who = f"{escape(record.name)}: " if len(records) > 1 else ""
        for found in findings(record):
            steps = f"step {found.first_step}"
            if found.last_step > found.first_step:
                steps = f"steps {found.first_step} to {found.last_step}"
            items.append(
                f'<li class="{found.severity}"><p><strong>{who}{_capital(found.sentence)}</strong> <small>'
                f"{found.severity}, {steps}, {escape(found.rule)}</small></p>"
                f"<p>Likely {escape(found.cause)}. {_capital(found.remedy)}.</p></li>"
            )
    if not items:
        return '<p class="lead">The doctor has found nothing to warn of.</p>' if records[0].stage == "ppo" else ""
    return f'<h2>What the doctor found</h2><ul class="findings">{"".join(items)}</ul>'


def doubts(record: RunRecord) -> str:
    """A sentence that keeps the first answer from being believed alone; empty for a run that is well."""
    severities = [found.severity for found in findings(record)]
    counts = [(severities.count("divergence"), "divergence"), (severities.count("warning"), "warning")]
    said = " and ".join(f"{count} {what}{'s' * (count > 1)}" for count, what in counts if count)
    return f" But the doctor found {said}: see below." if said else ""


def _capital(text: str) -> str:
    return escape(text[:1].upper() + text[1:].rstrip("."))


def evaluation(records: Sequence[RunRecord]) -> str:
    """Baseline and policy on held-out prompts, with 95 % intervals where they were measured."""
    parts = []
    for record in records:
        if not record.evaluation or "policy" not in record.evaluation:
            continue
        title = f"Evaluation on {record.evaluation['prompts']:,} held-out prompts"
        name = f" <small>{escape(record.name)}</small>" if len(records) > 1 else ""
        parts.append(f"<h2>{title}{name}</h2>{_evaluation_table(record.evaluation)}")
    return "".join(parts)


def _evaluation_table(found: dict[str, Any]) -> str:
    intervals = found.get("intervals", {})
    lines = []
    for name, label in MEASURES.items():
        if name not in found["policy"]:
            continue
        before, after, shares = found["baseline"][name], found["policy"][name], name == "eos_rate"
        shown, differing = percent if shares else number, partial(difference, shares=shares)
        columns = [("baseline", before, shown), ("policy", after, shown), ("difference", after - before, differing)]
        lines.append(
            [label, *(_with_interval(value, intervals.get(who, {}).get(name), say) for who, value, say in columns)]
        )
    win = found.get("win_rate")
    if win:
        interval = f"<small>{percent(win['low'])} to {percent(win['high'])}</small>"
        lines.append(["the judge prefers", percent(1 - win["rate"]), f"{percent(win['rate'])} {interval}", ""])
    note = "<p class=note>Small numbers are 95 % intervals; differences are of pairs of answers to one prompt.</p>"
    return rows(lines, head=["", "baseline", "policy", "difference"], kind="numbers") + (
        note if intervals or win else ""
    )


def _with_interval(value: float, interval: list[float] | None, shown: Callable[[float], str]) -> str:
    if interval is None or interval[0] == interval[1]:
        return shown(value)
    return f"{shown(value)} <small>{shown(interval[0]).removesuffix(' points')} to {shown(interval[1])}</small>"


def memory(record: RunRecord) -> str:
    """What was planned beside what was measured, of each role's largest process."""
    if not record.memory:
        return ""
    lines = [
        [escape(role), f"{found['predicted'] / 1e9:.2f} GB", f"{found['measured'] / 1e9:.2f} GB"]
        for role, found in record.memory["roles"].items()
    ]
    table = rows(lines, head=["", "planned", "measured"], kind="numbers")
    chosen = ", ".join(f"{name} = {value}" for name, value in record.memory["chosen"].items())
    note = f"{record.memory['predicted'] / 1e9:.2f} of {record.memory['budget'] / 1e9:.1f} GB planned in all"
    reduced = record.memory.get("reduced", {}).items()  # which older runs lack
    halved = ", ".join(f"{role}: {name} = {size}" for role, sizes in reduced for name, size in sizes.items())
    note += f"; chosen to fit: {escape(chosen)}" if chosen else "; nothing had to be changed to fit"
    note += f"; halved as memory did not suffice: {escape(halved)}." if halved else "."
    return f"<h2>Memory, planned and measured</h2>{table}<p class=note>{note}</p>"


def closing(record: RunRecord) -> str:
    """What a stage said of its model when it was done."""
    lines = "".join(f"<li>{escape(line.strip())}</li>" for line in record.closing)
    return f'<h2>In its own words</h2><ul class="plain">{lines}</ul>' if lines else ""


def configuration(records: Sequence[RunRecord]) -> str:
    """What differs from the defaults, or among the runs; then everything, folded."""
    if len(records) > 1:
        return _differences(records)
    settings = settings_of(records[0].config)
    defaults = settings_of(CONFIGS[records[0].stage]().resolved())
    changed = [(n, v, defaults.get(n, "")) for n, v in settings.items() if n in defaults and v != defaults[n]]
    table = rows([[_name(n), escape(v), escape(d)] for n, v, d in changed], head=["", "this run", "default"])
    everything = rows([_name(name), escape(value)] for name, value in settings.items())
    return (
        f"<h2>Configuration</h2>{table if changed else '<p>All defaults.</p>'}"
        f"<details><summary>All {len(settings)} settings</summary>{everything}</details>"
    )


def _name(setting: str) -> str:
    """A setting's name, broken between its words on a narrow screen."""
    return escape(setting).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _differences(records: Sequence[RunRecord]) -> str:
    settings = [settings_of(record.config) for record in records]
    names = dict.fromkeys(name for values in settings for name in values)
    differ = [n for n in names if len({values.get(n, "") for values in settings}) > 1]
    lines = [[_name(n), *(escape(values.get(n, "absent")) for values in settings)] for n in differ]
    table = rows(lines, head=["", *(escape(record.name) for record in records)])
    return f"<h2>How their configurations differ</h2>{table if lines else '<p>Not at all.</p>'}"
