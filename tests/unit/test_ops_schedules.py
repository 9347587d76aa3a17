"""Learning-rate schedules."""

from __future__ import annotations

from itertools import pairwise

import pytest

from rlhf_ray.ops.schedules import SCHEDULES, constant, cosine, linear, warmup_steps


def test_linear_runs_from_one_to_one_over_total() -> None:
    assert [linear(u - 1, 4) for u in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]


def test_constant() -> None:
    assert {constant(step, 10) for step in range(10)} == {1.0}


@pytest.mark.parametrize(
    ("total", "fraction", "expected"),
    [
        (1000, 0.03, 30),
        (100, 0.03, 3),
        (20, 0.03, 1),
        (10, 0.03, 1),
        (9, 0.03, 0),
        (100, 0.5, 10),
        (100, 0.0, 0),
    ],
)
def test_warmup_is_never_longer_than_a_tenth(total: int, fraction: float, expected: int) -> None:
    assert warmup_steps(total, fraction) == expected


def test_cosine_rises_for_three_percent_then_falls() -> None:
    factors = [cosine(step, 100) for step in range(100)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(later < earlier for earlier, later in pairwise(factors[3:]))
    assert cosine(3 + 97 // 2, 100) == pytest.approx(0.5, abs=0.01)
    assert 0.0 < factors[-1] < 0.001


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 9, 10, 1000])
def test_every_update_of_every_schedule_learns(name: str, total: int) -> None:
    factors = [SCHEDULES[name](step, total) for step in range(total)]
    assert all(0.0 < factor <= 1.0 for factor in factors)
    assert max(factors) == 1.0


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_finished_run_has_rate_zero(name: str) -> None:
    assert SCHEDULES[name](50, 50) == pytest.approx(0.0)
    assert SCHEDULES[name](60, 50) == pytest.approx(0.0)


def test_warmup_is_available_to_all() -> None:
    for schedule in SCHEDULES.values():
        assert schedule(0, 100, 0.03) == 0.25
        assert schedule(3, 100, 0.03) == 1.0
