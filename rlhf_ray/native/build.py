"""Compiles the native pass once and opens it.

The library is kept under ``$RLHF_RAY_CACHE``, else ``~/.cache/rlhf_ray``, named by sources, compiler and processor, so
a home that several machines share holds one for each.  It is plain C to ctypes, with no header of torch's or Python's:
it compiles in two seconds where a torch extension takes half a minute and needs ninja.

Left out on purpose: Windows, and shipping binaries.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = ("vectors.h", "team.h")
SOURCES = ("forward.cpp", "draw.cpp", "attention.cpp", "gelu.cpp")
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp"),
    *("-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"),
)


class NativeUnavailableError(RuntimeError):
    """Why the native pass can't be had here."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled library; NativeUnavailableError, in one sentence, where it can't be compiled or opened."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise NativeUnavailableError("there is no C++ compiler (g++ or $CXX)")
    try:
        folder = cache_folder()
    except OSError as error:
        raise NativeUnavailableError(f"nothing can be kept ({error}); set RLHF_RAY_CACHE to a folder") from error
    path = folder / f"native-{_fingerprint(compiler)}.so"
    if not path.is_file():
        _compile(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"{path} can't be opened ({error}); remove it") from error


def build_problem() -> str:
    """Why the library can't be had here; empty, and the library compiled, when it can."""
    try:
        library()
    except NativeUnavailableError as error:
        return str(error)
    return ""


def cache_folder() -> Path:
    """Where this machine keeps what it can make again; OSError where that can't be had."""
    folder = Path(os.environ.get("RLHF_RAY_CACHE") or Path.home() / ".cache" / "rlhf_ray")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _fingerprint(compiler: str) -> str:
    """Digest of everything that the library depends on."""
    digest = hashlib.sha256(" ".join((*FLAGS, compiler, platform.machine())).encode())
    for name in (*HEADERS, *SOURCES):
        digest.update((HERE / name).read_bytes())
    digest.update(_output(compiler, "--version"))
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file():
        lines = cpu.read_text(errors="replace").splitlines()
        digest.update("".join(sorted({line for line in lines if line.startswith(("model name", "flags"))})).encode())
    return digest.hexdigest()[:16]


def _output(*command: str) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NativeUnavailableError(f"{command[0]} does not run ({error})") from error


def _compile(compiler: str, path: Path) -> None:
    """Compile beside the place and move there, so that nobody ever opens half a library."""
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        made = Path(work) / path.name
        command = [compiler, *FLAGS, *(str(HERE / name) for name in SOURCES), "-o", str(made)]
        try:
            subprocess.run(command, capture_output=True, check=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
            raise NativeUnavailableError(f"{compiler} can't compile it: {said[-500:]}") from error
        made.replace(path)
