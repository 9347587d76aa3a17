"""Inputs made ahead: the same ones in the same order, no more than asked for, and errors where they are waited for."""

from __future__ import annotations

import threading

import pytest

from rlhf_ray.runtime.train_input import Inputs


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_every_step_gets_its_own_input(ahead: int) -> None:
    with Inputs(lambda step: step * step, ahead=ahead) as inputs:
        assert [inputs.take(step) for step in range(5, 12)] == [step * step for step in range(5, 12)]


def test_the_thread_is_ahead_by_so_many_steps_and_no_more() -> None:
    made: list[int] = []
    all_made = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 3:
            all_made.set()
        return step

    with Inputs(make, ahead=2) as inputs:
        inputs.take(1)
        assert all_made.wait(timeout=30)
    assert made == [1, 2, 3]


def test_without_a_thread_nothing_is_made_early() -> None:
    made: list[int] = []
    with Inputs(made.append, ahead=0) as inputs:
        inputs.take(1)
    assert made == [1]


def test_an_error_is_raised_at_the_step_that_it_belongs_to() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise RuntimeError("row 7 is broken")
        return step

    with Inputs(make, ahead=2) as inputs:
        assert inputs.take(1) == 1
        with pytest.raises(RuntimeError, match="row 7 is broken"):
            inputs.take(2)
