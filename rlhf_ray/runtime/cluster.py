"""Joining or starting a Ray cluster, and refusing at once what it can't give.

A cluster is joined when RAY_ADDRESS names one (as it does inside a submitted job); otherwise one is started on this
machine, for this process alone.  ``address="local"`` keeps a stale address file from being believed.

Left out on purpose: which worker goes where, which is ``placement.py``'s; waiting for an autoscaler to add machines.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from rlhf_ray import console
from rlhf_ray.runtime.environment import in_a_job, joins_a_cluster
from rlhf_ray.runtime.placement import NODE_ID, Node, Request, Seat, place, refuse, where

RELEASE_SECONDS = 10.0
LOOK_SECONDS = 60.0


def start() -> None:
    """Join or start the cluster, once a process."""
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": "warning"}
    if joins_a_cluster():
        runtime_env = {} if in_a_job() else {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
        ray.init(address=os.environ["RAY_ADDRESS"], runtime_env=runtime_env, **options)
    else:
        _make_token()
        ray.init(address="local", **options)
    _keep_token_private()


def start_while_importing(module: str) -> None:
    """Join or start the cluster while a thread imports a module: both take seconds, and Ray mostly waits.

    The other way round would not do: ``ray.init`` belongs in the main thread, where it handles signals.
    """
    with ThreadPoolExecutor(1) as thread:
        imported = thread.submit(import_module, module)
        start()
        imported.result()


def connect(*, need: Iterable[Request]) -> dict[str, list[Seat]]:
    """Join or start the cluster, and find every worker that a role asks for a seat.

    Raises ValueError, after a table of what is asked for and what is there, before any worker is started: Ray itself
    would wait for ever.  Actors that have just ended get time to hand back what they held.
    """
    start()
    requests = list(need)
    idle = [replace(node, free_cpus=node.cpus, free_gpus=node.gpus) for node in nodes()]
    patience = 0.0 if place(requests, idle)[1] else RELEASE_SECONDS
    deadline = time.monotonic() + patience
    while True:
        found = nodes()
        seats, lacking = place(requests, found)
        if not lacking:
            if len(found) > 1:
                console.say(where(seats))
            return seats
        if time.monotonic() > deadline:
            refuse(requests, found, lacking)
        time.sleep(0.2)


def nodes() -> list[Node]:
    """The machines that are alive, this one first."""
    here = ray.get_runtime_context().get_node_id()
    free = ray._private.state.available_resources_per_node()
    found = [
        Node(
            id=node["NodeID"],
            name=f"{node['NodeManagerHostname']} {node['NodeID'][:6]}",
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            free_cpus=free.get(node["NodeID"], {}).get("CPU", 0.0),
            free_gpus=free.get(node["NodeID"], {}).get("GPU", 0.0),
            labels={name: value for name, value in node["Labels"].items() if name != NODE_ID},
            here=node["NodeID"] == here,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: not node.here)


def check_shared(folders: Sequence[Path], machines: Iterable[Node]) -> None:
    """Raise ValueError naming a machine that does not see one of the folders, or does not answer."""

    @ray.remote(num_cpus=0)
    def unseen() -> list[str]:
        return [str(folder) for folder in folders if not folder.is_dir()]

    asked = [(node, unseen.options(label_selector={NODE_ID: node.id}).remote()) for node in machines]
    for node, answer in asked:
        try:
            lacking = ray.get(answer, timeout=LOOK_SECONDS)
        except GetTimeoutError as error:
            sought = " and ".join(map(str, folders))
            raise ValueError(
                f"machine {node.name} has not said in {LOOK_SECONDS:g} s whether it sees {sought}"
            ) from error
        for folder in lacking:
            raise ValueError(
                f"machine {node.name} does not see {folder}: models and checkpoints belong on a disk that every "
                "machine sees (docs/CLUSTER.md)"
            )


def _token() -> Path:
    """Where Ray keeps the token of this user's clusters."""
    return Path.home() / ".ray" / "auth_token"


def _make_token() -> None:
    """Write a token for its owner alone, where there is none and one is wanted.

    Of several runs that start together all take the first one's: Ray would have each write its own over the others',
    with which their clusters have begun.  Where files can't be linked it is Ray's own again.
    """
    token, given = _token(), {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if given or os.environ.get("RAY_AUTH_MODE") != "token" or token.is_file():
        return
    token.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=token.parent, encoding="utf-8") as new:
        new.write(secrets.token_hex(32))
        new.flush()
        with suppress(OSError):  # another run was first
            os.link(new.name, token)


def _keep_token_private() -> None:
    """Take a token that Ray has written, readable by every user of the machine, back to its owner."""
    token = _token()
    if token.is_file() and token.stat().st_mode & 0o077:
        token.chmod(0o600)


def dashboard_address() -> str | None:
    """Where the Ray dashboard listens, or None when it does not run."""
    url: str | None = ray._private.worker.get_dashboard_url()
    return f"http://{url}" if url else None
