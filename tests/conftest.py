"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf_ray.native.build import cache_folder

REPOSITORY = Path(__file__).resolve().parent.parent
# Ray's workers yield to everybody else; beside another process of tests, that is to starve until its deadlines pass.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors are faster on one thread, and float32 sums are then equal between processes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept for later runs is not kept among the user's own; the compiled library is taken from there."""
    folder = tmp_path_factory.mktemp("cache")
    for file in cache_folder().glob("*.so"):
        (folder / file.name).symlink_to(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_RAY_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real corpora named by RLHF_TEST_DATA; tests that need it skip without it."""
    folder = os.environ.get("RLHF_TEST_DATA")
    if not folder:
        pytest.skip("RLHF_TEST_DATA is not set: no real corpora to test on")
    return Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave GPU tests out where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skipif(True, reason="no CUDA device"))
