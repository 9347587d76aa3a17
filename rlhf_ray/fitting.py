"""Making a run fit the memory that there is: the plan before its workers start, and what became of it at the end.

Left out on purpose: several cards or machines, whose plan would have to know who sits where.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from rlhf_ray import console
from rlhf_ray.config import PPOConfig
from rlhf_ray.crews import ROLES, device_of_roles
from rlhf_ray.failures import WorkerLost
from rlhf_ray.models.shared_base import FrozenBase
from rlhf_ray.planning import choose, table
from rlhf_ray.planning.budget import budget
from rlhf_ray.planning.choose import Plan
from rlhf_ray.planning.needs import Device
from rlhf_ray.planning.shapes import models_of
from rlhf_ray.ppo_inputs import Inputs
from rlhf_ray.run import Run
from rlhf_ray.rundir.files import replace_text
from rlhf_ray.runtime.cluster import nodes, start
from rlhf_ray.workers.groups import Crew
from rlhf_ray.workers.learner import LearnerWorker
from rlhf_ray.workers.meter import peak_memory, resident

FILE = "memory.json"
WORTH_A_TABLE = 0.5
"""Share of a host's memory from which on a run is shown where it goes; on a card it always is."""


def fit(config: PPOConfig, inputs: Inputs, say: Callable[[str], object]) -> Plan | None:
    """The plan of a run, shown as a line and, where memory may be short, a table; None, and a line, where none is made.

    ValueError, in one sentence that names what would fit, when nothing does that gives the same results.
    """
    found = inputs.device
    if config.num_rollout_workers:
        start()
        machines = nodes()
        found = device_of_roles(config.device, found, machines)
        if len(machines) > 1 or machines[0].gpus > 1:
            gpus = sum(machine.gpus for machine in machines)
            say(f"memory: not planned, as there are {len(machines)} machines and {gpus:g} GPUs")
            return None
    if inputs.base and not inputs.base.shared:  # as its file could not be written
        config = choose.changed(config, {"memory.share_base": False})
    device: Device = "cuda" if found == "cuda" else "cpu"
    there, what = budget(config, device)
    longest = max(map(len, inputs.all_prompts.token_ids), default=0)
    models = models_of(config, base=inputs.base.base if inputs.base else None)
    asked = choose.Run(config=config, models=models, device=device, budget=there, longest_prompt=longest)
    plan = choose.plan(asked, what=what)
    if device == "cuda" or plan.chosen or plan.prediction.total > WORTH_A_TABLE * there:
        console.table("memory, predicted in GB", table.COLUMNS, table.rows(plan.prediction))
    say(table.summary(plan, config))
    return plan


def limits(plan: Plan | None) -> dict[str, int]:
    """Bytes that torch may take of the card in each role's process: what is planned, and its part of what is left."""
    if plan is None or plan.prediction.device == "cpu":
        return {}
    prediction, more = plan.prediction, plan.budget / plan.prediction.total
    known = [need for need in prediction.needs if need.base]  # a reward function's own use of the card is not
    if prediction.together:
        return {need.role: plan.budget - need.base for need in known}
    return {need.role: int(more * need.peak) - need.base for need in known}


def report(plan: Plan, built: Mapping[type[Any], Crew], run: Run, common: FrozenBase | None) -> None:
    """Say how much memory every role took at most, beside what was predicted, and keep it in the run's folder.

    With it is kept what had to be made smaller because memory did not suffice.
    """
    mapped = resident(common.file()) if common and common.shared and plan.prediction.device == "cpu" else 0
    alone = {"predicted": plan.prediction.total, "measured": peak_memory() + mapped}
    found: dict[str, dict[str, Any]] = {"run": alone}
    reduced = {ROLES[worker]: dict(crew.usage().reduced) for worker, crew in built.items()}
    if not plan.prediction.together:
        found = {
            need.role: {"processes": need.processes, "phase": need.phase, "predicted": need.peak, "measured": measured}
            for need in plan.prediction.needs
            if (measured := mapped if need.role == "base" else _measured(need.role, built)) is not None
        }
    for role, values in found.items():
        base = max(need.base for need in plan.prediction.needs if role in ("run", need.role))
        if plan.prediction.device == "cuda":
            values["measured"] += base  # which torch does not see
    content = {
        "device": plan.prediction.device,
        "budget": plan.budget,
        "predicted": plan.prediction.total,
        "chosen": dict(plan.chosen),
        "reduced": {role: settings for role, settings in reduced.items() if settings},
        "roles": found,
    }
    replace_text(run.folder / FILE, json.dumps(content, indent=2) + "\n")
    shown = [f"{role} {v['predicted'] / 1e9:.2f} / {v['measured'] / 1e9:.2f}" for role, v in found.items()]
    run.say(f"memory of one process, predicted / measured in GB: {', '.join(shown)} ({FILE})")


def _measured(role: str, built: Mapping[type[Any], Crew]) -> int | None:
    """Bytes that a process of the role has taken at most; None of roles that nobody measures."""
    if role == "driver":
        return peak_memory()
    crew = next((crew for worker, crew in built.items() if ROLES[worker] == role), None)
    if crew is None:
        return None
    used = crew.usage()
    if role == ROLES[LearnerWorker]:
        with suppress(WorkerLost):  # which, at the end, takes nothing away
            used += crew.aside("usage")  # a checkpoint's files are written beside calls
    return used.peak_bytes
