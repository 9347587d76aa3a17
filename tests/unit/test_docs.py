"""The documentation names only code that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REFERENCE = re.compile(r"`((?:rlhf_ray|tests|launch|data)/[\w/]+\.py):([\w.]+)`")


def definitions(path: Path) -> set[str]:
    """Functions, classes, methods (``Class.method``) and assigned names of a module."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name):
                names.add(name)
            case ast.ClassDef(name=name, body=body):
                names |= {name} | {f"{name}.{f.name}" for f in body if isinstance(f, ast.FunctionDef)}
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


def test_algorithms_page_refers_to_code_that_exists(repository: Path) -> None:
    text = (repository / "docs" / "ALGORITHMS.md").read_text(encoding="utf-8")
    references = REFERENCE.findall(text)
    assert len(references) > 60
    missing = [
        f"{path}:{name}"
        for path, name in references
        if not (repository / path).is_file() or name not in definitions(repository / path)
    ]
    assert not missing


def test_algorithms_page_covers_the_maths(repository: Path) -> None:
    """Every public function of the three modules that hold equations has its place on the page."""
    text = (repository / "docs" / "ALGORITHMS.md").read_text(encoding="utf-8")
    for module in ("kl", "advantages", "losses"):
        path = f"rlhf_ray/ops/{module}.py"
        tree = ast.parse((repository / path).read_text(encoding="utf-8"))
        public = [f.name for f in tree.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")]
        assert [name for name in public if f"`{path}:{name}`" not in text] == []
