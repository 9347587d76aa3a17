"""What every worker does around its work: its own thread count, and a count of tokens, busy seconds and memory."""

from __future__ import annotations

import ctypes
import mmap
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from rlhf_ray.types import Usage

STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """Bytes that this process has had at most: what torch has reserved on its GPU, else private host memory.

    Libraries, mapped files and Ray's store, which processes share, are left out; elsewhere than on Linux they count.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    if not STATUS.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    fields = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines())
    most, file, store = (int(fields[name].split()[0]) for name in ("VmHWM", "RssFile", "RssShmem"))
    return 1024 * (most - file - store)


def resident(file: Path) -> int:
    """Bytes of a file that are in memory, for whoever has mapped it."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        there = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_ubyte.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(len(mapped)), there)
        del first  # or the mapping could not be closed
    assert not failed
    return mmap.PAGESIZE * sum(page & 1 for page in there)


def give_back() -> None:
    """Return what torch and the C library keep for later to the device and to the system."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


class Meter:
    """Counts a worker's tokens and busy seconds, and holds its torch thread count while it works.

    In one process several roles take turns with different thread counts; a role's sums are then those that it
    would have got in a process of its own.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._tokens = 0
        self._seconds = 0.0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Time a block of work, on this worker's threads."""
        before, start = torch.get_num_threads(), time.perf_counter()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - start
            if before != self.threads:
                torch.set_num_threads(before)

    def count(self, tokens: int) -> None:
        """Add to the tokens worked on."""
        self._tokens += tokens

    def take(self, reduced: Mapping[str, int] | None = None) -> Usage:
        """Read the meter and set it to zero; ``reduced`` is what memory did not suffice for."""
        usage = Usage(tokens=self._tokens, seconds=self._seconds, peak_bytes=peak_memory(), reduced=reduced or {})
        self._tokens, self._seconds = 0, 0.0
        return usage
