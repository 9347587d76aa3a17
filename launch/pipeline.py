"""Every stage in order, from raw text to a before/after table; stages that are up to date are skipped."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray.cli import main
from rlhf_ray.config import PipelineConfig


def run(config: PipelineConfig) -> None:
    """Run the stages and say what to run next."""
    from rlhf_ray.pipeline import run_pipeline

    folders = run_pipeline(config)
    if "ppo" in folders:
        print(f"next: python launch/chat.py --policy {folders['ppo']}")
    else:
        print("next: the same command without --until goes on from here")


if __name__ == "__main__":
    sys.exit(main(PipelineConfig, __doc__ or "", None, run))
