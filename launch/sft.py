"""Fine-tune a pre-trained policy on conversations."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray import console
from rlhf_ray.cli import main
from rlhf_ray.config import SFTConfig


def run(config: SFTConfig) -> None:
    """Train, then say what comes next."""
    from rlhf_ray.stages import sft

    console.say(f"wrote {sft(config)}")
    console.say("next: python launch/reward_model.py")


if __name__ == "__main__":
    sys.exit(main(SFTConfig, __doc__ or "", "sft", run))
