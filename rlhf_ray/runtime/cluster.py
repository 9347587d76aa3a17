"""Joining or starting a Ray cluster, and refusing at once what it can't give.

A cluster is joined when RAY_ADDRESS names one (as it does inside a submitted job); otherwise one is started on this
machine, for this process alone.  ``address="local"`` keeps a stale address file from being believed.

Left out on purpose: placement, which is the actors' own business.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ray

from rlhf_ray.runtime.environment import joins_a_cluster


def connect(*, need: Mapping[str, float]) -> None:
    """Join or start the cluster (once a process), and check that it has what is needed.

    ``need`` maps resource names (``CPU``, ``GPU``) to amounts.  Raises ValueError, naming what is missing, before any
    worker is started: Ray itself would wait for ever.
    """
    if not ray.is_initialized():
        options: dict[str, Any] = {"log_to_driver": True, "logging_level": "warning"}
        if joins_a_cluster():
            in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
            runtime_env = {} if in_job else {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
            ray.init(address=os.environ["RAY_ADDRESS"], runtime_env=runtime_env, **options)
        else:
            ray.init(address="local", **options)
    check_resources(need, ray.cluster_resources())


def check_resources(need: Mapping[str, float], have: Mapping[str, float]) -> None:
    """Raise ValueError when a resource is asked for beyond what there is."""
    short = [
        f"{amount:g} {name} (there are {have.get(name, 0):g})"
        for name, amount in need.items()
        if amount > have.get(name, 0) + 1e-9
    ]
    if short:
        raise ValueError(
            f"the cluster can't give {' and '.join(short)}; ask for fewer workers, for a smaller share of a core or "
            "GPU each, or add machines"
        )


def dashboard_address() -> str | None:
    """Where the Ray dashboard listens, or None when it does not run."""
    url: str | None = ray._private.worker.get_dashboard_url()
    return f"http://{url}" if url else None
