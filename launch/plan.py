"""What a PPO run would need of memory, by role and phase, and what is chosen so that it fits; starts nothing."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray.cli import main
from rlhf_ray.config.plan import PlanConfig


def run(config: PlanConfig) -> None:
    """Print the plan, or the table of all presets."""
    from rlhf_ray.planning.command import show_plan, show_presets

    if config.all:
        show_presets()
        return
    show_plan(config)
    print("next: python launch/ppo.py with the same flags")


if __name__ == "__main__":
    sys.exit(main(PlanConfig, __doc__ or "", "ppo", run))
