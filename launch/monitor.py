"""Prometheus beside the runs of this machine: live curves of every run in a browser."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray.cli import main
from rlhf_ray.config import MonitorConfig


def run(config: MonitorConfig) -> None:
    """Start Prometheus, say where its pages are, and stay until Ctrl-C."""
    from rlhf_ray.monitoring.prometheus import watch

    watch(config)


if __name__ == "__main__":
    sys.exit(main(MonitorConfig, __doc__ or "", None, run))
