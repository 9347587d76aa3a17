"""Learners that work as one learn what one alone learns, however many there are and whatever each holds."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import Workers, make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.algorithms.ppo import credit
from rlhf_ray.config import PPOConfig
from rlhf_ray.crews import worker_arguments
from rlhf_ray.failures import Deaths, WorkerLost
from rlhf_ray.ppo_inputs import read_inputs
from rlhf_ray.roles import gather
from rlhf_ray.run import read_metrics
from rlhf_ray.runtime.all_crews import stop, wait_until_built
from rlhf_ray.runtime.cluster import connect, ray
from rlhf_ray.runtime.crew import RayCrew
from rlhf_ray.runtime.placement import Request
from rlhf_ray.runtime.rendezvous import Rendezvous
from rlhf_ray.shortage import micro_batch
from rlhf_ray.types import Done, Judged, Shards
from rlhf_ray.workers.groups import Crew, LearnerGroup, LocalCrew
from rlhf_ray.workers.learner import LearnerWorker

TIES = "val/clipfrac_avg"
"""Counts tokens whose clipped value loss is larger, where rounding decides about values that have hardly moved."""


class OpenLearner(LearnerWorker):
    """A learner that shows what it holds."""

    def cut(self, rows: int) -> None:
        """Take so many rows a micro-batch from now on."""
        self.portion = micro_batch(rows)

    def checkpoint(self, on: bool) -> None:
        """Keep activations, or compute them again."""
        model: Any = self.model
        model.policy.checkpointing = model.critic.trunk.checkpointing = on

    def parameters(self) -> Tensor | None:
        """Those of policy and critic in one vector, on the first rank."""
        self.snapshot()
        if not (self.ranks.first and self._snapshot):
            return None
        model: Any = self._snapshot[0]
        return torch.cat([p.detach().flatten() for net in (model.policy, model.critic) for p in net.parameters()])

    def held(self) -> int:
        """Numbers of the policy that this rank holds, at most; the first rank's."""
        parts: list[Any] = list(self.model.policy.parameters())
        return sum((part.to_local() if self.sharded else part).numel() for part in parts)

    def suffer(self, number: signal.Signals) -> None:
        """Die or hang, if this is the second rank."""
        if self.ranks.rank == 1:
            os.kill(os.getpid(), number)
        self.ranks.sum(torch.ones(1))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learners")
    make_world(folder)
    return folder


def crew_of_two(arguments: dict[str, Any], **changes: Any) -> RayCrew:
    seats = connect(need=[Request(role="learner", count=2, cpus=0.1)])["learner"]
    return RayCrew(
        OpenLearner,
        {**arguments, **changes},
        role="learner",
        seats=seats,
        own=Rendezvous(2, timeout=100.0),
        deaths=Deaths(0, 60.0, print),
        timeout=100.0,
        together=True,
    )


@pytest.fixture(scope="module")
def config(world: Path) -> PPOConfig:
    """Mini-batches of 5, 5 and 2 rows: two ranks never have equally many."""
    return ppo_config(world, ppo={"mini_batch_size": 5, "entropy_coef": 0.01}, total_steps=9)


@pytest.fixture(scope="module")
def crews(config: PPOConfig) -> Iterator[dict[str, RayCrew]]:
    """Two learners that hold everything each, and two that hold a part."""
    connect(need=[])
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    arguments = worker_arguments(config, read_inputs(config))[LearnerWorker]
    built = {sharding: crew_of_two(arguments, sharding=sharding) for sharding in ("none", "fsdp2")}
    wait_until_built(list(built.values()))
    yield built
    stop(list(built.values()))


def learn(crew: Crew, judged: Judged, config: PPOConfig, *, steps: int) -> list[dict[str, float]]:
    """Metrics of a few steps on the same rows, credit included."""
    group, history = LearnerGroup(crew), []
    for _ in range(steps):
        judged = replace(judged, evaluation=gather(group.evaluate(Shards((Done(judged.rollout),)))))
        experience, credited = credit(config.ppo, judged, config.kl.coef)
        history.append({**credited, **group.update(experience).result()})
    return history


def learn_from_a_bad_row(crew: Crew, judged: Judged, config: PPOConfig) -> dict[str, float]:
    """Metrics of a step in which one row, and so one rank, has a return that is not a number."""
    group = LearnerGroup(crew)
    judged = replace(judged, evaluation=gather(group.evaluate(Shards((Done(judged.rollout),)))))
    experience, _ = credit(config.ppo, judged, config.kl.coef)
    assert experience.returns is not None
    returns = experience.returns.clone()
    returns[0] = float("nan")
    return group.update(replace(experience, returns=returns)).result()


def agree(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        assert {k: v for k, v in one.items() if k != TIES} == pytest.approx(
            {k: v for k, v in other.items() if k != TIES}, abs=1e-5, rel=1e-5
        )


def test_any_ranks_sharding_and_micro_batches_learn_the_same_and_read_each_others_checkpoints(
    config: PPOConfig, crews: dict[str, RayCrew], tmp_path: Path
) -> None:
    arguments = worker_arguments(config, read_inputs(config))[LearnerWorker]
    alone = LocalCrew(OpenLearner(**arguments))
    workers = Workers.build(config)
    judged = workers.judge(workers.generate())

    def save(crew: Crew, name: str) -> Path:
        (tmp_path / name).mkdir()
        LearnerGroup(crew).snapshot().result()
        LearnerGroup(crew).write(tmp_path / name)
        return tmp_path / name

    learn(alone, judged, config, steps=1)  # so that the optimiser has moments
    start = save(alone, "start")
    wanted = learn(alone, judged, config, steps=3)
    parameters = alone.call("parameters").result()
    onward = learn(alone, judged, config, steps=1)
    skipping = learn_from_a_bad_row(alone, judged, config)
    assert (skipping["update/skipped"], skipping["policy/optimiser_steps"]) == (2, 4)
    for sharding, crew in crews.items():
        learned = []
        for rows, checkpointing in ((1, False), (2, False), (12, False), (12, True)):
            LearnerGroup(crew).load(start)
            crew.call("cut", rows).result()
            crew.call("checkpoint", checkpointing).result()
            agree(learn(crew, judged, config, steps=3), wanted)
            learned.append(crew.call("parameters").result())
            torch.testing.assert_close(learned[-1], parameters, atol=1e-6, rtol=0)
        assert torch.equal(learned[-1], learned[-2])  # activations computed again are those that were kept
        end = save(crew, sharding)
        assert sorted(file.name for file in end.iterdir()) == sorted(file.name for file in start.iterdir())
        agree(learn(crew, judged, config, steps=1), onward)
        again = LocalCrew(OpenLearner(**arguments))
        LearnerGroup(again).load(end)
        agree(learn(again, judged, config, steps=1), onward)
        weights, own = (LearnerGroup(c).weights(4).result() for c in (crew, again))
        assert abs(weights.buffer - own.buffer).max() <= 1e-6
        tokens = int(judged.rollout.attention_mask.sum())
        assert crew.usage().tokens == 13 * (1 + config.ppo.epochs) * tokens  # 13 steps, each rank's rows counted once
        agree([learn_from_a_bad_row(crew, judged, config)], [skipping])  # both ranks skip, or they would wait for ever
    whole, part = (crew.call("held").result() for crew in crews.values())
    assert whole / 2 <= part < 0.6 * whole


def test_the_death_of_a_rank_is_the_death_of_all_and_they_begin_anew(crews: dict[str, RayCrew]) -> None:
    crew = crews["none"]
    with pytest.raises(WorkerLost, match="learner worker 1 died"):
        crew.call("suffer", signal.SIGKILL).result()
    crew.restart()
    assert crew.call("held").result() > 1000
    crew.call_timeout = 3.0
    with pytest.raises(WorkerLost, match=r"learner worker 0 died \(no answer to suffer for 3 s\)"):
        crew.call("suffer", signal.SIGSTOP).result()  # the first one waits for the second: it is not known who hangs
    meetings = [own["meeting"] for own in Rendezvous(2, timeout=60.0)()]
    assert all(meeting.timeout >= 120 for meeting in meetings), "ranks wait for each other longer than a call may take"


def test_a_run_of_two_sharded_learners_equals_one_alone_and_one_alone_takes_it_up(world: Path) -> None:
    changes: dict[str, Any] = {"total_steps": 2, "ppo": {"critic": "shared"}}
    alone = ppo_config(world, run="alone", **changes)
    both = ppo_config(
        world, run="both", num_rollout_workers=1, num_learners=2, sharding="fsdp2", learner_threads=0, **changes
    )
    app.train_ppo(alone)
    app.train_ppo(both)

    def numbers(config: PPOConfig) -> list[dict[str, Any]]:
        rows = read_metrics(app.run_folder(config))
        return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]

    agree(numbers(both), numbers(alone))
    folder = app.run_folder(both)
    shutil.rmtree(folder / "step_000002")
    app.train_ppo(both.model_copy(update={"num_rollout_workers": 0, "num_learners": 1, "sharding": "none"}))
    assert "going on from" in (folder / "log.txt").read_text()
    agree(numbers(both), numbers(alone))
