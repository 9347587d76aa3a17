"""Processes of their own that have torch, Ray and this package already: forked from one that has nothing else.

To import them takes three seconds of a core each time.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

IMPORTED = ["rlhf_ray.pipeline", "rlhf_ray.stages", "rlhf_ray.app", "ray.train.torch", "torch.utils.tensorboard"]
PATIENCE_SECONDS = 300.0


def exit_code(work: Callable[..., None], *arguments: Any) -> int | None:
    """Of a process that does the work; None if it takes too long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=work, args=arguments, daemon=False)
    process.start()
    process.join(PATIENCE_SECONDS)
    code = process.exitcode
    process.kill()
    return code


def run_script(script: Path, arguments: Sequence[str], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What a script says and its exit code, as from a command line in that folder."""
    with tempfile.TemporaryDirectory() as name:
        said = [Path(name, stream) for stream in ("out", "err")]
        code = exit_code(_script, script, arguments, cwd, said)
        assert code is not None, f"{script.name} takes longer than {PATIENCE_SECONDS:g} s"
        return subprocess.CompletedProcess([str(script), *arguments], code, *(file.read_text() for file in said))


def _script(script: Path, arguments: Sequence[str], cwd: Path, said: Sequence[Path]) -> None:
    for stream, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(cwd)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
