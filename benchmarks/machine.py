"""The machine that a benchmark runs on: what it is, whether it is idle, and how fast it multiplies and reads.

The limits are measured in the process that uses them, with its threads: the largest product is the ceiling of
compute, the sum of a large tensor that of memory.

Left out on purpose: data sheets' figures, which no program reaches.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BUSY_CORES = 0.25
"""Cores that others may use while something is measured."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device() -> torch.device:
    """CUDA where there is any, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    """Wait until the device has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def describe() -> dict[str, Any]:
    """CPU, cores, threads, native bfloat16, GPU and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "native_bfloat16": any(flag in text for flag in ("avx512_bf16", "amx_bf16", " bf16 ")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "spin_count": os.environ.get("GOMP_SPINCOUNT"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def free_bytes() -> float:
    """Memory that programs can have now; without limit where the system does not say."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return min((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), default=math.inf)


def busy_cores(seconds: float = 1.0) -> float:
    """Cores in use by anybody over the next seconds; elsewhere than on Linux, the load average."""
    if not Path("/proc/stat").exists():
        return os.getloadavg()[0]
    before = _busy_seconds()
    time.sleep(seconds)
    return (_busy_seconds() - before) / seconds


def _busy_seconds() -> float:
    """Seconds that all cores together have not been idle since the machine started."""
    user, nice, system, _idle, _iowait, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What this process can reach at most."""

    flops: dict[str, float]
    """FLOP/s of the largest product in each dtype."""
    bytes_per_second: float
    """Of reading memory from end to end."""

    def seconds(self, dtype: str, *, flops: float, read: float) -> float:
        """The least time for so many operations and bytes, one hidden behind the other."""
        return max(flops / self.flops[dtype], read / self.bytes_per_second)

    def __str__(self) -> str:
        products = ", ".join(f"{flops / 1e9:,.0f} GFLOP/s {dtype}" for dtype, flops in self.flops.items())
        return f"{products}; memory read {self.bytes_per_second / 1e9:,.1f} GB/s"


def measure_limits(dtypes: list[str], *, quick: bool = False) -> Limits:
    """Time square products and the sum of a tensor larger than the caches; the best of several."""
    where = device()
    n = 512 if quick else 2048 if where.type == "cpu" else 8192
    flops = {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, dtype=torch.float32).to(where, DTYPES[dtype]) for _ in range(2))
        out = torch.empty_like(a)
        flops[dtype] = 2 * n**3 / _fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
    large = torch.ones((16 if quick else 256 if where.type == "cpu" else 4096) * 2**18, device=where)
    read = large.numel() * large.element_size() / _fastest(large.sum)
    return Limits(flops=flops, bytes_per_second=read)


def _fastest(call: Callable[[], object], *, repetitions: int = 7) -> float:
    """Seconds of the fastest call."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        synchronise()
        times.append(time.perf_counter() - start)
    return min(times)
