"""Crews of actors: work goes to whoever is free, weights go before it, and a dead actor is not waited for."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import Workers, make_world, ppo_config, stir

from rlhf_ray.crews import worker_arguments
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.ppo_inputs import read_inputs
from rlhf_ray.roles import gather
from rlhf_ray.runtime.cluster import connect, ray
from rlhf_ray.runtime.crew import RayCrew, stop, wait_until_built
from rlhf_ray.types import Done, Rollout
from rlhf_ray.workers.groups import GeneratorGroup, LocalCrew
from rlhf_ray.workers.rollout import RolloutWorker


class UnequalRolloutWorker(RolloutWorker):
    """The first one that is built takes its time over every shard; each says which shard it took."""

    def __init__(self, notes: Path, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.notes = notes
        try:
            os.close(os.open(notes / "slow", os.O_CREAT | os.O_EXCL))
            self.slow = True
        except FileExistsError:
            self.slow = False

    def generate(self, *arguments: Any) -> Rollout:
        """The same rows, late."""
        if self.slow:
            time.sleep(3)
        with (self.notes / "taken").open("a", encoding="utf-8") as file:
            file.write(f"{'slow' if self.slow else 'fast'}\n")
        return super().generate(*arguments)


def test_a_slow_worker_delays_no_shard_and_every_shard_has_the_weights_it_was_asked_for_with(tmp_path: Path) -> None:
    make_world(tmp_path)
    config = ppo_config(tmp_path, generation={"shard_size": 1})
    workers = Workers.build(config)
    stream = PromptStream(len(workers.rollout.prompts), 12, seed=0)
    versions = [workers.learner.weights(0)]
    stir(workers.learner.model.policy)
    versions.append(workers.learner.weights(1))

    def rows(group: GeneratorGroup) -> list[Rollout]:
        """Two batches, the second asked for while the first is under way."""
        asked = []
        for step, weights in enumerate(versions):
            group.update_weights(Done(weights))
            asked.append(group.generate(stream.take(step), step))
        return [gather(shards) for shards in asked]

    connect(need={})
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    crew = RayCrew(
        UnequalRolloutWorker,
        {**worker_arguments(config, read_inputs(config))[RolloutWorker], "notes": tmp_path},
        role="rollout",
        size=2,
        cpus=0.1,
        gpus=0.0,
        timeout=120.0,
    )
    try:
        wait_until_built([crew])
        found = rows(GeneratorGroup(crew, shard_size=1))
        alone = rows(GeneratorGroup(LocalCrew(workers.rollout), shard_size=1))
        for version, (one, other) in enumerate(zip(found, alone, strict=True)):
            assert one.policy_version.tolist() == [version] * 12
            for field in fields(one):
                assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name
        taken = Counter((tmp_path / "taken").read_text(encoding="utf-8").split())
        assert taken["slow"] + taken["fast"] == 24
        assert 1 <= taken["slow"] <= 6
        used = crew.usage()
        assert used.tokens == sum(int(rollout.response_mask.sum()) for rollout in found)
        assert used.workers == 2 and crew.usage().tokens == 0
        for actor in crew.actors:
            ray.kill(actor)
        with pytest.raises(ray.exceptions.RayActorError):
            crew.call("usage").result()
    finally:
        stop([crew])
