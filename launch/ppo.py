"""PPO on Ray: rollout workers, reward, reference and learner as separate actors."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray import console
from rlhf_ray.cli import main
from rlhf_ray.config import PPOConfig, repository_path
from rlhf_ray.startup import StartUp, process_age


def run(config: PPOConfig) -> None:
    """Train what is missing, then PPO."""
    startup = StartUp(age=process_age())
    startup.done("configuration")
    if config.num_rollout_workers and repository_path(config.policy).is_dir():
        from rlhf_ray.runtime.cluster import start_while_importing

        start_while_importing("rlhf_ray.pipeline")
        startup.done("imports_and_ray")
    from rlhf_ray.app import train_ppo
    from rlhf_ray.pipeline import ensure_ppo_inputs

    startup.done("imports")
    ensure_ppo_inputs(config)
    startup.done("stages_before")
    folder = train_ppo(config, startup)
    console.say(f"next: python launch/evaluate.py --policy {folder}, or python launch/chat.py --policy {folder}")


if __name__ == "__main__":
    sys.exit(main(PPOConfig, __doc__ or "", "ppo", run))
