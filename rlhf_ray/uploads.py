"""Bringing a mirror up to date with a run's folder: in a thread, one upload at a time.

The mirror gets config.yaml, metrics.jsonl, every checkpoint that the folder holds and it lacks, and then the names of
the newest and the best. So an upload that failed is made up for by the next one. A failure is said at once and does
not stop the run, whose local checkpoints are intact; it is an error at the run's end.

Left out on purpose: samples and TensorBoard events, which stay where they were written.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pyarrow import ArrowException

from rlhf_ray.rundir.files import CheckpointError
from rlhf_ray.storage import Mirror

FIRST, LAST = ("config.yaml", "metrics.jsonl"), ("best", "latest")
"""Files of a run that a mirror gets before and after the checkpoints."""


class Uploads:
    """The uploads of one run's folder."""

    def __init__(self, mirror: Mirror, root: Path, report: Callable[[str], object]) -> None:
        self._mirror, self._root, self._report = mirror, root, report
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirror")
        self._under_way: Future[None] | None = None

    def begin(self, folders: list[Path], *, keeps: Callable[[str], bool]) -> None:
        """Upload what the mirror lacks of these checkpoints, and delete those that it holds beside them, except the
        ones whose name it ``keeps``; they must not change until `wait`.
        """
        self.wait()
        self._under_way = self._thread.submit(self._try, folders, keeps)

    def wait(self) -> None:
        """Wait until no upload is under way."""
        if self._under_way:
            self._under_way.result()

    def finish(self, folders: list[Path], *, keeps: Callable[[str], bool]) -> None:
        """Bring the mirror up to date, and end the thread; CheckpointError when that fails."""
        self.wait()
        self._thread.shutdown()
        try:
            self._update(folders, keeps)
        except (OSError, ArrowException) as error:
            raise CheckpointError(f"{self._complaint(error)}; the same command tries again") from error

    def _try(self, folders: list[Path], keeps: Callable[[str], bool]) -> None:
        try:
            self._update(folders, keeps)
        except (OSError, ArrowException) as error:
            self._report(f"{self._complaint(error)}, and the run goes on; the next checkpoint tries again")

    def _complaint(self, error: Exception) -> str:
        return f"mirror {self._mirror.name} is behind: {error}; the checkpoints in {self._root} are intact"

    def _update(self, folders: list[Path], keeps: Callable[[str], bool]) -> None:
        self._copy(FIRST)
        for folder in folders:
            self._mirror.push(folder)
        self._copy(LAST)
        held = {folder.name for folder in folders}
        for name in self._mirror.names():
            if name not in held and not keeps(name):
                self._mirror.remove(name)

    def _copy(self, names: tuple[str, ...]) -> None:
        for name in names:
            if (self._root / name).is_file():
                self._mirror.write(name, (self._root / name).read_bytes())
