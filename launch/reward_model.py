"""Train a reward model on preference pairs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray import console
from rlhf_ray.cli import main
from rlhf_ray.config import RewardModelConfig


def run(config: RewardModelConfig) -> None:
    """Train, then say what comes next."""
    from rlhf_ray.stages import reward_model

    console.say(f"wrote {reward_model(config)}")
    console.say("next: python launch/ppo.py")


if __name__ == "__main__":
    sys.exit(main(RewardModelConfig, __doc__ or "", "reward_model", run))
