"""What the learner writes into a checkpoint is its state when it was asked, whatever it has learned since."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from worlds import Workers, make_world, policy_weights, ppo_config

from rlhf_ray.workers.snapshot import copy_of_module, copy_of_state


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_snapshot_is_the_state_of_its_moment(tmp_path: Path, critic: str) -> None:
    make_world(tmp_path)
    config = ppo_config(tmp_path, ppo={"critic": critic})
    workers = Workers.build(config)
    learner = workers.learner
    experience = workers.experience()
    learner.update(experience)
    policy, optimiser = policy_weights(workers), copy_of_state(learner.optimiser.state_dict())
    values = learner.evaluate(experience.rollout).values
    learner.snapshot()
    learner.update(workers.experience())
    assert not torch.equal(policy_weights(workers), policy)
    (tmp_path / "checkpoint").mkdir()
    learner.write(tmp_path / "checkpoint")
    again = Workers.build(config)
    again.learner.load(tmp_path / "checkpoint")
    assert again.learner.step == 1 and learner.step == 2
    assert torch.equal(policy_weights(again), policy)
    found = again.learner.evaluate(experience.rollout).values
    assert values is not None and found is not None and torch.equal(found, values)
    state = again.learner.optimiser.state_dict()["state"]
    assert state.keys() == optimiser["state"].keys() and len(state) > 20
    for number, expected in optimiser["state"].items():
        for name, tensor in expected.items():
            assert torch.equal(state[number][name], tensor), name
    with pytest.raises(AssertionError, match="there is no snapshot to write"):
        learner.write(tmp_path / "checkpoint")


def test_a_copy_shares_no_memory_and_keeps_ties() -> None:
    inner = torch.nn.Linear(3, 3)
    outer = torch.nn.ModuleDict({"one": inner, "other": inner, "norm": torch.nn.BatchNorm1d(3)})
    twin = copy_of_module(outer, outer)
    assert twin["one"] is twin["other"]
    expected = {name: tensor.clone() for name, tensor in outer.state_dict().items()}
    with torch.no_grad():
        for tensor in outer.state_dict().values():
            tensor.fill_(7)
    assert twin.state_dict().keys() == expected.keys()
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
