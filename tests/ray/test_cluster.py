"""What a cluster is asked for, and what it answers when it can't."""

from __future__ import annotations

import pytest

from rlhf_ray.runtime.cluster import check_resources


def test_what_is_there_is_enough() -> None:
    check_resources({"CPU": 2.0, "GPU": 0.0}, {"CPU": 2.0})
    check_resources({"CPU": 0.1 * 3, "GPU": 0.2 * 2 + 0.1 + 0.1 + 0.4}, {"CPU": 0.3, "GPU": 1.0})


def test_everything_that_is_short_is_named_with_advice() -> None:
    with pytest.raises(ValueError, match=r"can't give 8 CPU \(there are 2\) and 1 GPU \(there are 0\); ask for fewer"):
        check_resources({"CPU": 8.0, "GPU": 1.0}, {"CPU": 2.0})
