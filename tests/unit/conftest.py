"""Fixtures of the tests without Ray."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def _ray_has_ended() -> None:
    """A cluster that other tests have left in this process would take time, and say its lines in the middle of ours."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
