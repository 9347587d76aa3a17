"""Every stage in order, from raw text to a before/after table; stages that are up to date are skipped."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray.cli import main
from rlhf_ray.config import PipelineConfig


def run(config: PipelineConfig) -> None:
    """Run the stages and say how to talk to the result."""
    from rlhf_ray.pipeline import run_pipeline

    folders = run_pipeline(config)
    print(f"next: python launch/chat.py --policy {folders[-1]}")


if __name__ == "__main__":
    sys.exit(main(PipelineConfig, __doc__ or "", None, run))
