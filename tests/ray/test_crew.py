"""Crews of actors: work goes to whoever is free, weights go before it, and the dead are replaced a few times."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ObjectLostError
from ray.util import list_named_actors
from worlds import Workers, make_world, ppo_config, stir

from rlhf_ray.crews import worker_arguments
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.failures import Deaths, GaveUp, WorkerLost
from rlhf_ray.models.adapter_folders import Base
from rlhf_ray.models.shared_base import FrozenBase
from rlhf_ray.ppo_inputs import read_inputs
from rlhf_ray.roles import gather
from rlhf_ray.run import Run
from rlhf_ray.runtime.all_crews import stop, wait_until_built
from rlhf_ray.runtime.cluster import connect, ray
from rlhf_ray.runtime.crew import RayCrew
from rlhf_ray.runtime.dispatch import MOST_LOSSES
from rlhf_ray.runtime.loan import Loan
from rlhf_ray.runtime.placement import Request
from rlhf_ray.runtime.step_trace import CrewsTrace
from rlhf_ray.types import Done, Rollout, Usage
from rlhf_ray.workers.groups import GeneratorGroup, LocalCrew
from rlhf_ray.workers.lending import Lent, card_of
from rlhf_ray.workers.rollout import RolloutWorker


class UnequalRolloutWorker(RolloutWorker):
    """The first one that is built takes as long over its shard as the other one over all the rest; both keep count."""

    def __init__(self, notes: Path, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.notes = notes
        (notes / "taken").touch()
        try:
            os.close(os.open(notes / "slow", os.O_CREAT | os.O_EXCL))
            self.slow = True
        except FileExistsError:
            self.slow = False

    def generate(self, *arguments: Any) -> Rollout:
        """The same rows, late."""
        taken, deadline = self.notes / "taken", time.monotonic() + 100
        while self.slow and len(taken.read_text(encoding="utf-8")) < 23 * len("fast ") and time.monotonic() < deadline:
            time.sleep(0.01)
        with taken.open("a", encoding="utf-8") as file:
            file.write(f"{'slow' if self.slow else 'fast'} ")
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

    seats = connect(need=[Request(role="rollout", count=2, cpus=0.1)])["rollout"]
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    crew = RayCrew(
        UnequalRolloutWorker,
        {**worker_arguments(config, read_inputs(config))[RolloutWorker], "notes": tmp_path},
        role="rollout",
        seats=seats,
        deaths=Deaths(0, 60.0, print),
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
        assert Counter((tmp_path / "taken").read_text(encoding="utf-8").split()) == {"slow": 1, "fast": 23}
        used = crew.usage()
        assert used.tokens == sum(int(rollout.response_mask.sum()) for rollout in found)
        assert used.workers == 2 and crew.usage().tokens == 0
    finally:
        stop([crew])


class MortalWorker:
    """Falls as often as it is told to, over all lives."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes

    def fall(self, name: str, times: int) -> str:
        """Die, or answer when that has been done often enough."""
        with (self.notes / name).open("a+", encoding="utf-8") as file:
            file.write("x")
            file.flush()
            if file.tell() <= times:
                os.kill(os.getpid(), signal.SIGKILL)
        return name

    def fail(self) -> None:
        """Make a mistake."""
        raise KeyError("answer")

    def miss(self, ref: str, *values: object) -> None:
        """Say that a value is lost, when that may be said."""
        (self.notes / "asked").touch()
        while not (self.notes / "gone").exists():
            time.sleep(0.01)
        with (self.notes / "missed").open("a", encoding="utf-8") as file:
            file.write("x")
        raise ObjectLostError(ref, None, "")

    def usage(self) -> Usage:
        """Nothing."""
        return Usage()


def test_the_dead_are_replaced_as_often_as_the_run_stands_it_and_mistakes_are_not_repeated(tmp_path: Path) -> None:
    seats = connect(need=[Request(role="mortal", count=2, cpus=0.1)])["mortal"]
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    said: list[str] = []
    deaths = Deaths(3, 600.0, said.append)
    crew = RayCrew(
        MortalWorker, {"notes": tmp_path}, role="mortal", run="fallen", seats=seats, deaths=deaths, timeout=120.0
    )
    try:
        wait_until_built([crew])
        with pytest.raises(KeyError, match="answer"):
            crew.call("fail").result()
        (tmp_path / "gone").touch()
        with pytest.raises(ObjectLostError):
            crew.call("miss", "00").result()
        assert (tmp_path / "missed").read_text() == "x" * (1 + MOST_LOSSES)
        trace = CrewsTrace(tmp_path, 1, name="driver", crews=[crew], patience=60.0)
        trace.begin(1)
        falls, others = crew.call("fall", "often", 3), [crew.call("fall", f"never {i}", 0) for i in range(4)]
        assert [other.result() for other in others] == [f"never {i}" for i in range(4)]
        assert falls.result() == "often"
        assert deaths.count == len(said) == 3
        named = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
        living = [re.fullmatch(r"fallen: mortal worker ([01])( \((\d)\))?", name) for name in named]
        assert sorted(name[1] for name in living if name) == ["0", "1"]  # of the dead, no more
        assert sum(int(name[3] or 1) - 1 for name in living if name) == 3
        for line in said:
            assert line.startswith("mortal worker ") and line.endswith("; replaced, 1 job handed out again")
        with Run.open(tmp_path / "run", {}, resume=False) as run:
            trace.end(1, run)
        log = (tmp_path / "run" / "log.txt").read_text()
        assert re.search(r"trace of step 1: .*; without mortal worker \d.*, which ended before the step did; open", log)
        last = crew.call("fall", "once", 1)
        with pytest.raises(
            GaveUp, match=r"died 4 times within 600 s, and max_restarts is 3: mortal worker \d (once|\d times)"
        ):
            last.result()
        with pytest.raises(GaveUp):  # and so does everything that it is asked for from now on
            crew.call("fall", "never", 0).result()
    finally:
        stop([crew])


def test_a_course_that_was_left_ends_nobody_for_the_values_that_it_misses(tmp_path: Path) -> None:
    """A learner's value that was lost means that the learner is: the old one, which has been replaced since."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    deaths = Deaths(0, 600.0, print)
    crews = []
    for role in ("learner", "mortal"):
        seats = connect(need=[Request(role=role, count=1, cpus=0.1)])[role]
        together = role == "learner"
        crews.append(
            RayCrew(
                MortalWorker,
                {"notes": tmp_path},
                role=role,
                seats=seats,
                deaths=deaths,
                timeout=120.0,
                together=together,
            )
        )
    learner, mortal = crews
    try:
        wait_until_built(crews)
        weights = learner.call("fall", "never", 0)
        missing = mortal.call("miss", weights.job.ended.result().hex(), weights)
        while not (tmp_path / "asked").exists():
            time.sleep(0.01)
        mortal.abandon()
        (tmp_path / "gone").touch()
        with pytest.raises(ObjectLostError):
            missing.result()
        assert learner.call("fall", "never", 0).result() == weights.result() == "never"
    finally:
        stop(crews)


class Lender:
    """Lends what says which process it is."""

    def lend(self) -> Lent:
        """A CPU's, which needs no GPU and is opened in the same way."""
        return Lent(card=card_of(torch.device("cpu")), opening=(torch.tensor, ([os.getpid()],)))

    def fall(self) -> None:
        """Die."""
        os.kill(os.getpid(), signal.SIGKILL)

    def usage(self) -> Usage:
        """Nothing."""
        return Usage()


class Borrower(Lender):
    """Keeps what it was lent when it was built."""

    def __init__(self, base: FrozenBase) -> None:
        assert base.borrow
        self.lent = base.borrow(torch.device("cpu"))

    def read(self) -> tuple[int, int]:
        """Whose memory it has, and who it is itself."""
        assert self.lent is not None
        return int(self.lent), os.getpid()


def test_who_borrows_the_learners_memory_begins_anew_with_that_of_its_successor(tmp_path: Path) -> None:
    seats = connect(need=[Request(role="learner", count=1, cpus=0.1), Request(role="reward", count=1, cpus=0.1)])
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    common: dict[str, Any] = {"deaths": Deaths(3, 600.0, print), "timeout": 120.0}
    learner = RayCrew(Lender, {}, role="learner", seats=seats["learner"], together=True, **common)
    loan = Loan(learner, FrozenBase(base=Base(folder=tmp_path, sha256="")))
    own = loan.given(lambda: [{}], lambda base: {"base": base})
    reader = RayCrew(Borrower, {}, role="reward", seats=seats["reward"], own=own, borrows=True, **common)
    try:
        wait_until_built([learner, reader])
        lender, first = reader.call("read").result()
        assert lender != first and reader.call("read").result() == (lender, first)
        with pytest.raises(WorkerLost):
            learner.call("fall").result()
        for crew in (learner, reader):
            crew.restart()
        successor, second = reader.call("read").result()
        assert len({lender, first, successor, second}) == 4
    finally:
        stop([learner, reader])
