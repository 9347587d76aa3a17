"""Compare two policies on held-out prompts, or measure their perplexity."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray.cli import main
from rlhf_ray.config import EvaluateConfig


def run(config: EvaluateConfig) -> None:
    """Measure and print, then say what comes next."""
    from rlhf_ray.evaluation.compare import compare, show
    from rlhf_ray.evaluation.perplexity import perplexities, show_perplexities

    if config.perplexity:
        show_perplexities(perplexities(config), config)
    else:
        show(compare(config), config)
    print(f"next: python launch/chat.py --compare {config.baseline} {config.policy}")


if __name__ == "__main__":
    sys.exit(main(EvaluateConfig, __doc__, None, run))
