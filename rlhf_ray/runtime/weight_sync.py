"""Who joins the learner's broadcasts of weights: every rollout worker that is there when a version comes out.

They form a group that lives as long as nothing changes.  When a worker dies, comes or hangs, or a broadcast fails, the
next version has a new one.  Whoever is not in it, or whom it failed, is given the weights through the store
(``Published``), so a broadcast decides how fast weights are somewhere, and never what is computed.

Left out on purpose: the broadcast itself (``workers/direct.py``); waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray

from rlhf_ray.runtime.actor import ASIDE
from rlhf_ray.runtime.crew import RayCrew
from rlhf_ray.runtime.pending import Pending
from rlhf_ray.workers.ranks import Meeting, open_store

PATIENCE = 30.0
"""Seconds that all have to come together, and for each message, which is 64 MB at most."""


class Broadcasts:
    """Has the learner send its weights to the rollout workers that are there."""

    def __init__(self, learner: RayCrew, workers: RayCrew, say: Callable[[str], object]) -> None:
        """``say`` is told when a broadcast fails."""
        self._learner, self._workers, self._say = learner, workers, say
        self._host = ray.util.get_node_ip_address()
        self._store = open_store(self._host)
        self._groups = 0
        self._members: list[Any] = []
        self._meetings: list[Meeting] = []
        self._receiving: dict[Any, Any] = {}

    def publish(self, policy_version: int) -> Pending:
        """Ask the learner for a version, and workers to receive it; waits for nobody."""
        receivers = self._ready()
        if not receivers:
            return self._learner.call("weights", policy_version)
        own, *theirs = self._meet([self._learner.actors[0], *receivers])
        sent = self._learner.call("weights", policy_version, own)
        for actor, meeting in zip(receivers, theirs, strict=True):
            receive = actor.aside.options(name="rollout.receive", concurrency_group=ASIDE)
            self._receiving[actor] = receive.remote("receive", meeting)
        sent.job.ended.add_done_callback(self._sent)
        return sent

    def _ready(self) -> list[Any]:
        """Workers that have started and do not hang over an earlier broadcast."""
        there = list(self._workers.ready.values())
        self._receiving = {actor: ref for actor, ref in self._receiving.items() if actor in there}
        refs = list(self._receiving.values())
        busy = ray.wait(refs, num_returns=len(refs), timeout=0)[1] if refs else []
        return [actor for actor in there if self._receiving.get(actor) not in busy]

    def _meet(self, members: list[Any]) -> list[Meeting]:
        """Where each member finds the others: in the group that they are, or in a new one."""
        if members != self._members:
            self._groups += 1
            self._members = members
            self._meetings = [
                Meeting(
                    host=self._host,
                    port=self._store.port,
                    rank=rank,
                    size=len(members),
                    timeout=PATIENCE,
                    name=f"broadcasts {self._groups}",
                )
                for rank in range(len(members))
            ]
        return self._meetings

    def _sent(self, ended: Future[Any]) -> None:
        """Look at what the learner says of its broadcast, when that is there."""
        if not ended.exception():
            ended.result().future().add_done_callback(self._heard)

    def _heard(self, done: Future[Any]) -> None:
        """Leave a group that has failed, and say so."""
        if done.exception():
            return  # whoever waits for the weights hears of it
        notice = done.result().notice
        if notice.problem:
            self._members = []
            version = notice.weights.policy_version
            self._say(f"weights {version} go through the store: their broadcast failed ({notice.problem})")
