"""On what a run computes: machine.json in its folder, written anew whenever the run is started.

Nothing is asked of a GPU's driver, as that would cost its memory.  Left out on purpose: names of hosts and users, which
nobody who is shown a report needs to know, and a cluster's other machines.
"""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

from rlhf_ray.rundir.files import replace_text

MACHINE = "machine.json"


def machine() -> dict[str, str]:
    """This machine in a few words, by name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [_field(path, "Model") for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    return {
        "processor": f"{_field(Path('/proc/cpuinfo'), 'model name') or platform.machine()}, {os.cpu_count()} cores",
        "memory": f"{memory:.0f} GiB",
        "GPU": ", ".join(gpus) or "none",
        "system": f"{platform.system()} {platform.machine()}",
        "software": f"Python {platform.python_version()}, torch {version('torch')}, Ray {version('ray')}",
    }


def write_machine(folder: Path) -> None:
    """Write it into a run's folder."""
    replace_text(folder / MACHINE, json.dumps(machine(), indent=1) + "\n")


def _field(path: Path, name: str) -> str:
    """The first value of a name in a file of ``name : value`` lines; empty where there is no such file or name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    values = [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name]
    return values[0] if values else ""
