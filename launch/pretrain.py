"""Pre-train a policy on raw text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray import console
from rlhf_ray.cli import main
from rlhf_ray.config import PretrainConfig


def run(config: PretrainConfig) -> None:
    """Train, then say what comes next."""
    from rlhf_ray.stages import pretrain

    console.say(f"wrote {pretrain(config)}")
    console.say("next: python launch/sft.py")


if __name__ == "__main__":
    sys.exit(main(PretrainConfig, __doc__ or "", "pretrain", run))
