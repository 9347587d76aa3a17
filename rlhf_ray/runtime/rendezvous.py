"""Where the ranks of a group of actors meet: a store of this process, one a start.

It is this process's rather than the first rank's, so that a group that starts anew, on whatever machines, finds one at
the same address, and none that a dead rank has left behind.
"""

from __future__ import annotations

from typing import Any

import ray

from rlhf_ray.workers.ranks import Meeting, open_store

PATIENCE = 2.0
"""Times the limit of a call that a rank waits for the others.  When one hangs, the crew is to find it, and to start all
anew, before the others raise an error that says no more than that they have waited.
"""


class Rendezvous:
    """Opens a store at every call, and closes the one before."""

    def __init__(self, size: int, *, timeout: float) -> None:
        """``size`` ranks, whose start and calls may take ``timeout`` seconds."""
        self.size, self.timeout = size, timeout

    def __call__(self) -> list[dict[str, Any]]:
        """What each rank's arguments differ in; nothing for a rank that is alone."""
        if self.size == 1:
            return [{}]
        host = ray.util.get_node_ip_address()
        self._store = open_store(host)
        ranks = [
            Meeting(host=host, port=self._store.port, rank=rank, size=self.size, timeout=PATIENCE * self.timeout)
            for rank in range(self.size)
        ]
        return [{"meeting": meeting} for meeting in ranks]
