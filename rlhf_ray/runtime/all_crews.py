"""What is done with all crews of a run at once."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.runtime.crew import RayCrew


def wait_until_built(crews: Sequence[RayCrew]) -> None:
    """Wait for every worker's constructor; ends every actor and raises what one of them raised."""
    try:
        for crew in crews:
            crew.wait_until_built()
    except BaseException:  # Ctrl-C too: a joined cluster must not keep them
        stop(crews)
        raise


def stop(crews: Sequence[RayCrew]) -> None:
    """End every actor."""
    for crew in crews:
        crew.stop()
