"""Joining or starting a Ray cluster, and refusing at once what it can't give.

A cluster is joined when RAY_ADDRESS names one (as it does inside a submitted job); otherwise one is started on this
machine, for this process alone.  ``address="local"`` keeps a stale address file from being believed.

Left out on purpose: placement, which is the actors' own business.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import ray

from rlhf_ray.runtime.environment import joins_a_cluster

RELEASE_SECONDS = 10.0


def start() -> None:
    """Join or start the cluster, once a process."""
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": "warning"}
    if joins_a_cluster():
        in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        runtime_env = {} if in_job else {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
        ray.init(address=os.environ["RAY_ADDRESS"], runtime_env=runtime_env, **options)
    else:
        ray.init(address="local", **options)


def start_while_importing(module: str) -> None:
    """Join or start the cluster while a thread imports a module: both take seconds, and Ray mostly waits.

    The other way round would not do: ``ray.init`` belongs in the main thread, where it handles signals.
    """
    with ThreadPoolExecutor(1) as thread:
        imported = thread.submit(import_module, module)
        start()
        imported.result()


def connect(*, need: Mapping[str, float]) -> None:
    """Join or start the cluster, and check that it has what is needed.

    ``need`` maps resource names (``CPU``, ``GPU``) to amounts.  Raises ValueError, naming what is missing, before any
    worker is started: Ray itself would wait for ever.
    """
    start()
    check_resources(need, ray.cluster_resources())
    _wait_until_free(need)


def _wait_until_free(need: Mapping[str, float]) -> None:
    """Give actors that have just ended time to hand back what they held; ValueError when others keep it."""
    deadline = time.monotonic() + RELEASE_SECONDS
    while True:
        try:
            return check_resources(need, ray.available_resources(), state=" free")
        except ValueError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def check_resources(need: Mapping[str, float], have: Mapping[str, float], *, state: str = "") -> None:
    """Raise ValueError when a resource is asked for beyond what there is."""
    short = [
        f"{amount:g} {name} (there are {have.get(name, 0):g}{state})"
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
