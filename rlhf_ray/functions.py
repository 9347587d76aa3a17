"""Functions that a user names on the command line as ``path/to/file.py:function``.

Left out on purpose: dotted module names and any sandbox; the file is the user's own program and runs as such.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_ray.config import repository_path


def _split(spec: str, field: str) -> tuple[Path, str]:
    """File and function name."""
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"{field} = {spec!r} is not of the form path/to/file.py:function")
    file = repository_path(path)
    if not file.is_file():
        raise ValueError(f"{field} = {spec!r}: there is no file {file}")
    return file, name


def load_function(spec: str, *, field: str = "function") -> Callable[..., Any]:
    """The function that ``path/to/file.py:name`` means, its file freshly run.

    Raises ValueError naming the field when the text has another form, or file or function is missing; what
    the file itself raises passes.
    """
    file, name = _split(spec, field)
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:12]
    module = ModuleType(f"{file.stem}_{digest}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    # Not by importlib, which takes cached bytecode for a file that was rewritten within a second, at the same size.
    exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    function = vars(module).get(name)
    if not callable(function):
        known = ", ".join(sorted(key for key, value in vars(module).items() if callable(value))) or "none"
        raise ValueError(f"{field} = {spec!r}: {file} has no function {name} (it has: {known})")
    return function
