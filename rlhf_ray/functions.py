"""Functions that a user names on the command line as ``path/to/file.py:function``.

Left out on purpose: dotted module names and any sandbox; the file is the user's own program and runs as such.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType
from typing import Any

from rlhf_ray.config import repository_path


class _FromSource(SourceFileLoader):
    """Without bytecode, which Python takes from its cache for a file that was rewritten within a second, as long."""

    def get_code(self, fullname: str) -> CodeType:
        """The file as it is now."""
        return self.source_to_code(self.get_data(self.path), self.path)


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
    loader = _FromSource(f"{file.stem}_{digest}", str(file))
    module_spec = spec_from_loader(loader.name, loader)
    assert module_spec is not None
    module = module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up there
    loader.exec_module(module)
    function = vars(module).get(name)
    if not callable(function):
        known = ", ".join(sorted(key for key, value in vars(module).items() if callable(value))) or "none"
        raise ValueError(f"{field} = {spec!r}: {file} has no function {name} (it has: {known})")
    return function
