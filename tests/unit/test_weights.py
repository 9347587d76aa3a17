"""Weights on their way, which the digest guards against whatever can happen to them: as a value, broadcast to workers
of whom one leaves in mid-transfer, and read from memory that sender and receiver share."""

from __future__ import annotations

import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch
from small_models import random_model

from rlhf_ray.failures import WorkerLost
from rlhf_ray.models import GPT2
from rlhf_ray.models.flat import flat_weights
from rlhf_ray.types import Weights
from rlhf_ray.workers.direct import Broadcast, Group, Inlet, Notice, OnCard
from rlhf_ray.workers.ranks import Meeting, open_store
from rlhf_ray.workers.weights import CHUNK, digest, export_weights, import_weights

VERSION = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def buffer() -> np.ndarray:
    """Two whole chunks and a part of one."""
    made = np.random.default_rng(0).standard_normal(5 * CHUNK // 8, dtype=np.float32)
    made.setflags(write=False)  # as it arrives from shared memory
    return made


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_change_the_digest(buffer: np.ndarray, threads: int) -> None:
    assert digest(buffer, VERSION, threads=threads) == digest(buffer, VERSION)


@pytest.mark.parametrize("made", [np.array, torch.tensor])
def test_altered_exchanged_repeated_and_missing_words_are_found(buffer: np.ndarray, made: Callable[..., Any]) -> None:
    def altered(bit: int) -> np.ndarray:
        flipped = buffer.copy()
        flipped.view(np.uint8)[bit // 8] ^= 1 << bit % 8
        return flipped

    first, second, rest = np.split(buffer, [CHUNK // 4, CHUNK // 2])
    exchanged = buffer.copy()
    exchanged[[5, 7]] = exchanged[[7, 5]]
    others = [
        *map(altered, (0, 31, 8 * CHUNK - 1, 8 * CHUNK, 20 * CHUNK - 1)),
        *map(np.concatenate, ((second, first, rest), (first, first, rest), (first, second))),
        exchanged,
    ]
    found = {digest(made(other), VERSION) for other in others}
    found |= {digest(made(buffer), VERSION), digest(made(buffer), VERSION + 1)}
    assert len(found) == len(others) + 2
    assert digest(made(buffer.copy()), VERSION) == digest(made(buffer), VERSION)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_only_weights_are_taken_over_in_place_and_noticed(dtype: torch.dtype) -> None:
    policy = random_model()
    held = random_model().to(dtype)
    addresses = [p.data_ptr() for p in held.parameters()]
    counts = [p._version for p in held.parameters()]
    weights = export_weights(policy, VERSION, dtype, threads=2)
    weights.buffer.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_weights(held, weights)
    for mine, sent in zip(held.parameters(), policy.parameters(), strict=True):
        assert torch.equal(mine, sent.to(dtype))
    assert [p.data_ptr() for p in held.parameters()] == addresses
    assert all(p._version > count for p, count in zip(held.parameters(), counts, strict=True))  # engines look at it


def test_an_export_is_a_copy() -> None:
    policy: GPT2 = random_model()
    weights = export_weights(policy, VERSION, torch.float32)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1)
    import_weights(policy, weights)  # an older version can be given after newer ones were made
    assert digest(export_weights(policy, VERSION, torch.float32).buffer, VERSION) == weights.digest


@pytest.fixture
def meetings() -> Callable[[str, int], list[Meeting]]:
    """Where the members of a group meet, by its name and size."""
    store = open_store("127.0.0.1")

    def of(name: str, size: int) -> list[Meeting]:
        about = {"host": "127.0.0.1", "port": store.port, "size": size, "timeout": 20.0, "name": name}
        return [Meeting(rank=rank, **about) for rank in range(size)]

    return of


def taken(inlet: Inlet, notice: Notice) -> list[torch.Tensor] | None:
    """A model's parameters after it has taken over what an inlet has, if it has that."""
    model = random_model()
    with inlet.found(notice) as weights:
        if weights is None:
            return None
        import_weights(model, weights)
    return list(model.parameters())


def assert_same(found: list[torch.Tensor] | None, model: GPT2) -> None:
    assert found is not None
    assert all(map(torch.equal, found, model.parameters()))


def stirred(policy: GPT2) -> GPT2:
    """The policy, after an update."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1)
    return policy


def test_a_broadcast_reaches_all_or_is_known_to_have_failed(meetings: Callable[[str, int], list[Meeting]]) -> None:
    """Two versions in one group; a third that somebody leaves in mid-transfer; a fourth in a new group."""
    sender, inlets, policy = Broadcast(2, threads=1), [Inlet(CPU), Inlet(CPU)], random_model()

    def publish(version: int, *places: Meeting) -> Notice:
        own, *theirs = places
        with ThreadPoolExecutor(len(theirs)) as pool:
            work = [pool.submit(inlet.receive, place) for inlet, place in zip(inlets, theirs, strict=False)]
            work += [pool.submit(leave, place) for place in theirs[len(inlets) :]]
            notice = sender.publish(policy, version, torch.float32, own)
            assert [task.result() for task in work] == [None] * len(theirs)
        return notice

    def leave(place: Meeting) -> None:
        Group(place).broadcast(np.zeros(40, dtype=np.uint8))  # the header alone

    first = meetings("first", 3)
    old = publish(0, *first)
    assert_same(taken(inlets[0], old), policy)
    stirred(policy)
    notice = publish(1, *first)
    for inlet in inlets:
        assert_same(taken(inlet, notice), policy)
        assert taken(inlet, old) is None
    stirred(policy)
    failed = publish(2, *meetings("second", 4))
    assert failed.problem
    assert [taken(inlet, failed) for inlet in inlets] == [None, None]
    import_weights(again := random_model(), sender.kept(2))  # what the store is given
    assert_same(list(again.parameters()), policy)
    notice = publish(3, *meetings("third", 3))
    assert not notice.problem and not old.problem
    assert_same(taken(inlets[1], notice), policy)
    with pytest.raises(KeyError):
        sender.kept(1)


def test_a_reader_of_the_senders_memory_has_what_was_published_and_the_newest_versions_are_kept() -> None:
    sender, inlet, policy = OnCard(2), Inlet(CPU), random_model()
    for version in range(5):
        notice = sender.publish(stirred(policy), version, torch.float32, None)
        assert_same(taken(inlet, notice), policy)
        kept = sender.kept(version)
        assert kept.policy_version == version and np.array_equal(kept.buffer, flat_weights(policy))
        import_weights(random_model(), kept)
    half = OnCard(1).publish(policy, 9, torch.bfloat16, None)
    with inlet.found(half) as weights:
        assert weights is not None
        import_weights(model := random_model().to(torch.bfloat16), weights)
    assert_same(list(model.parameters()), policy.bfloat16())
    assert notice.lent and taken(Inlet(CPU), replace(notice, lent=replace(notice.lent, card="another"))) is None
    with pytest.raises(AssertionError, match="version 2 is kept no longer"):
        sender.kept(2)
    with pytest.raises(AssertionError, match="arrived altered"):
        taken(inlet, replace(notice, weights=replace(notice.weights, digest=sender.kept(3).digest)))


def read_and_answer(pipe: Connection) -> None:
    """Another process on the same card."""
    inlet, model = Inlet(torch.device("cuda:0")), random_model().cuda()
    while isinstance(notice := pipe.recv(), Notice):
        with inlet.found(notice) as weights:
            assert isinstance(weights, Weights)
            import_weights(model, weights)
        pipe.send(flat_weights(model))


@pytest.mark.gpu
def test_another_process_reads_weights_from_the_memory_of_the_card() -> None:
    """Three versions in two places, so that one place is read twice."""
    sender, policy = OnCard(2), random_model().cuda()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=read_and_answer, args=(theirs,), daemon=True)
    process.start()
    for version in range(3):
        ours.send(sender.publish(stirred(policy), version, torch.float32, None))
        assert np.array_equal(ours.recv(), flat_weights(policy))
        assert np.array_equal(sender.kept(version).buffer, flat_weights(policy))
    ours.send("that is all")
    process.join(60)
    assert process.exitcode == 0


def test_a_lost_keeper_is_told_of_from_process_to_process() -> None:
    lost = pickle.loads(pickle.dumps(WorkerLost("learner worker 0", "killed")))
    assert (lost.who, lost.why, str(lost)) == ("learner worker 0", "killed", "learner worker 0 died (killed)")
