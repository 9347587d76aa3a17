"""Whether the presets fit the cards that they are named after, and how much of what was predicted they take.

    python benchmarks/gpu_memory.py --json gpu_memory.json
    python benchmarks/gpu_memory.py --presets gpt2_small_6gb --steps 1

Every preset runs three steps of ``launch/ppo.py`` on models of its shape with random weights, prompts and responses of
full length, with ``--gpu-memory`` as on its card.  What the device's driver says is taken, over all processes, is
looked at while it runs, and ends the run when it exceeds the card.  The device has to be idle.

Left out on purpose: speed, and hosts without a GPU, where ``memory_plan.py`` measures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side import REPOSITORY, Report, Row, parser, shrink, words  # isort: skip
import torch
import yaml
from random_models import write_models, write_prompts

from rlhf_ray.config.loader import merge, read_yaml
from rlhf_ray.config.presets import preset_file
from rlhf_ray.planning.budget import card_memory
from rlhf_ray.planning.command import SHAPES

LOOK_SECONDS = 0.05


def configuration(name: str, folder: Path, options: argparse.Namespace) -> Path:
    """A preset's settings over models and prompts in a folder; returns the configuration's file."""
    write_models(folder, SHAPES[name])
    settings = read_yaml(preset_file("ppo", name))
    write_prompts(
        folder / "prompts.txt",
        SHAPES[name],
        count=settings["batch_size"],
        length=settings["generation"]["prompt_length"],
    )
    here: dict[str, Any] = {
        "checkpoints": str(folder / "checkpoints"),
        "policy": str(folder / "policy"),
        "rewards": [{"kind": "model", "source": str(folder / "reward")}],
        "prompts": str(folder / "prompts.txt"),
        "template": "plain",
        "run": "default",
        "device": "cuda",
        "gpu_memory": f"{card_of(name)}GB",
        "total_steps": options.steps,
        "save_every": options.steps,
    }
    file = folder / "ppo.yaml"
    file.write_text(yaml.safe_dump(merge(settings, here)), encoding="utf-8")
    return file


def card_of(name: str) -> int:
    """GB of the card that a preset is named after."""
    return int(name.rpartition("_")[2].removesuffix("gb"))


def taken() -> int:
    """Bytes of the card that are in use, whoever has them."""
    total, free = card_memory()
    return total - free


def measure(name: str, options: argparse.Namespace) -> Row:
    """A preset's run, watched from outside."""
    with tempfile.TemporaryDirectory() as folder_name:
        folder, before, most = Path(folder_name), taken(), 0
        file, log = configuration(name, folder, options), folder / "out.txt"
        command = [sys.executable, str(REPOSITORY / "launch" / "ppo.py"), "--config", str(file)]
        with log.open("w", encoding="utf-8") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=REPOSITORY)
            while process.poll() is None:
                most = max(most, taken() - before)
                if most > card_of(name) * 10**9:
                    process.terminate()
                time.sleep(LOOK_SECONDS)
        if process.returncode:
            print(log.read_text(encoding="utf-8")[-2000:], file=sys.stderr)
        plan = folder / "checkpoints" / "ppo" / "default" / "memory.json"
        content = json.loads(plan.read_text(encoding="utf-8")) if plan.is_file() else {}
    predicted = content.get("predicted", 0)
    return {
        "preset": name,
        "card GB": card_of(name),
        "completed": process.returncode == 0 and most <= card_of(name) * 10**9,
        "predicted GB": round(predicted / 1e9, 2),
        "measured GB": round(most / 1e9, 2),
        "off": f"{predicted / most - 1:+.0%}" if most else "",
        "roles": ", ".join(
            f"{role} {found['predicted'] / 1e9:.2f} / {found['measured'] / 1e9:.2f}"
            for role, found in content.get("roles", {}).items()
        ),
    }


def main() -> None:
    """Measure every preset."""
    options_of = parser(__doc__ and __doc__.splitlines()[0], repetitions=1)
    options_of.add_argument("--presets", type=words, default=list(SHAPES))
    options_of.add_argument("--steps", type=int, default=3)
    options = options_of.parse_args()
    shrink(options, presets=["mini_xl_6gb"], steps=1)
    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA device here; launch/plan.py --all says what is predicted")
    report = Report("gpu_memory", options)
    title = f"{torch.cuda.get_device_name()}: the driver's figure over all processes, {options.steps} steps"
    report.table(title, [measure(name, options) for name in options.presets])
    report.close()


if __name__ == "__main__":
    main()
