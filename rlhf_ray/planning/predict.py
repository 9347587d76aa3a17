"""What a whole PPO run needs, predicted from its configuration and the shapes of its models.

Left out on purpose: several cards or machines; one of either is planned for.
"""

from __future__ import annotations

from rlhf_ray.config import PPOConfig
from rlhf_ray.planning.learner import learner
from rlhf_ray.planning.needs import Device, Prediction
from rlhf_ray.planning.roles import Models, Work


def predict(config: PPOConfig, models: Models, device: Device, *, longest_prompt: int = 0) -> Prediction:
    """What a run needs of a card, or on a CPU of the host.

    ``longest_prompt`` counts tokens; 0 is ``generation.prompt_length``.
    """
    most = config.generation.prompt_length
    work = Work(config=config, models=models, device=device, prompt=min(longest_prompt or most, most))
    roles = [work.rollout(), work.reward(), learner(work)]
    if not config.lora.rank:
        roles.insert(2, work.reference())
    alone = config.num_rollout_workers == 0
    if work.shares and any(need.device == "cpu" for need in roles):
        roles.append(work.base())
    if device == "cpu":
        roles += [work.driver()] if alone else [work.driver(), work.ray()]
    return Prediction(
        device=device,
        needs=[need for need in roles if need.device == device],
        together=alone,
        returns=(device == "cpu" or config.memory.sleep) and not config.max_staleness,
        elsewhere=[need for need in roles if need.device != device],
    )
