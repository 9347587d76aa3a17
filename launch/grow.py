"""Give a policy's embedding rows for the special tokens, so that adapters can be trained on it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray import console
from rlhf_ray.cli import main
from rlhf_ray.config import GrowConfig


def run(config: GrowConfig) -> None:
    """Write the grown policy, then say what comes next."""
    from rlhf_ray.models.grow import grow

    console.say(f"wrote {grow(config)}")
    console.say(f"next: python launch/sft.py --policy {config.output} --lora.rank 16")


if __name__ == "__main__":
    sys.exit(main(GrowConfig, __doc__ or "", None, run))
