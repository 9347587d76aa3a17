"""``launch/plan.py``: what a run would need, or every preset on cards of several sizes, without starting anything.

Left out on purpose: measuring, which ``benchmarks/memory_plan.py`` and ``benchmarks/gpu_memory.py`` do.
"""

from __future__ import annotations

from rlhf_ray import console
from rlhf_ray.config import PPOConfig, load
from rlhf_ray.config.plan import PlanConfig
from rlhf_ray.config.presets import hardware_preset, preset_file
from rlhf_ray.planning import table
from rlhf_ray.planning.budget import budget
from rlhf_ray.planning.choose import Plan, Run, gigabytes, plan, proposals
from rlhf_ray.planning.needs import Device
from rlhf_ray.planning.shapes import models_of

SHAPES = {
    "mini_xl_6gb": "mini_xl",
    "gpt2_small_6gb": "small",
    "gpt2_medium_8gb": "medium",
    "gpt2_large_12gb": "large",
    "gpt2_xl_12gb": "xl",
}
"""The presets for a GPU and the shapes of their models."""
CARDS = (4, 6, 8, 12, 24)
"""GB."""


def show_plan(config: PlanConfig) -> Plan:
    """Print the plan of one run; ValueError, naming what would fit, when nothing does.

    ``gpu_memory`` plans for a GPU, wherever this is; else for the device of this machine.
    """
    on_card = bool(config.gpu_memory) or config.device == "cuda" or hardware_preset() == "mini_xl"
    device: Device = "cuda" if on_card and config.device != "cpu" else "cpu"
    default = "mini_xl" if device == "cuda" else "tiny"
    there, what = budget(config, device)
    models = models_of(config, named=config.preset, default=default)
    found = plan(Run(config=config, models=models, device=device, budget=there), what=what)
    console.table("memory, predicted in GB", table.COLUMNS, table.rows(found.prediction))
    console.say(table.summary(found, config))
    return found


def show_presets() -> None:
    """Print what every preset needs on cards of several sizes, as a table in Markdown."""
    print(f"| preset | {' | '.join(f'{card} GB' for card in CARDS)} |")
    print(f"| --- |{' --- |' * len(CARDS)}")
    for name, shape in SHAPES.items():
        config = load(PPOConfig, ["--config", str(preset_file("ppo", name))])
        print(f"| {name} | {' | '.join(_cell(config, shape, card) for card in CARDS)} |")


def _cell(config: PPOConfig, shape: str, card: int) -> str:
    """What a preset needs on a card, and what was chosen; else the first proposal that fits."""
    asked = Run(config=config, models=models_of(config, named=shape), device="cuda", budget=card * 10**9)
    found = asked.fitting()
    if found is None:
        return next((f"no; {way}" for way in proposals(asked)), "no")
    savers = [_short(name, new) for name, new in found.chosen.items()]
    return ", ".join([f"{gigabytes(found.prediction.total)}", *savers])


def _short(name: str, new: object) -> str:
    """A choice in a few words."""
    last = name.rpartition(".")[2].replace("_", " ")
    return last if isinstance(new, bool) else f"{last} {new}"
