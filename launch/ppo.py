"""PPO on Ray: rollout workers, reward, reference and learner as separate actors."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray.cli import main
from rlhf_ray.config import PPOConfig


def run(config: PPOConfig) -> None:
    """Train what is missing, then PPO."""
    from rlhf_ray.app import train_ppo
    from rlhf_ray.pipeline import ensure_ppo_inputs

    ensure_ppo_inputs(config)
    folder = train_ppo(config)
    print(f"next: python launch/evaluate.py --policy {folder}, or python launch/chat.py --policy {folder}")


if __name__ == "__main__":
    sys.exit(main(PPOConfig, __doc__ or "", "ppo", run))
