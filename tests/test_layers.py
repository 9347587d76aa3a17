"""Imports point down, and only the runtime knows Ray: read from the source, deferred imports included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# Each part may import those above it in this list and itself; parts of one line do not import each other.
LAYERS = [
    "config console failures profiling startup types",  # what a user may set, what a person sees, what flows
    "functions native ops roles rundir shortage",  # maths on tensors; protocols; a run's files, one by one
    "doctor live monitoring storage",
    "uploads",
    "checkpoint run tokenizer",
    "models",
    "data samples",
    "generation",
    "rewards objectives planning",
    "health workers algorithms",
    "evaluation probes report",
    "runtime rl_run ppo_inputs",
    "crews stages",
    "fitting",
    "app",
    "pipeline",
    "chat cli lint",
    "launch",
]
LAYER = {part: number for number, line in enumerate(LAYERS) for part in line.split()}

ALGORITHMS_MAY = {"types", "roles", "ops", "config", "algorithms"}
RAY_HOME = "rlhf_ray/runtime/"


def sources(repository: Path) -> list[Path]:
    files = [*(repository / "rlhf_ray").rglob("*.py"), *(repository / "launch").rglob("*.py")]
    assert len(files) > 50
    return sorted(files)


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that a file imports anywhere, ``from rlhf_ray import x`` as rlhf_ray.x."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}:{node.lineno}: relative import"
            if node.module == "rlhf_ray":
                yield from ((node.lineno, f"rlhf_ray.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def part_of(module: str) -> str:
    """The part of the program that a module of ours belongs to."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "rlhf_ray" else first


def own_part(file: Path, repository: Path) -> str:
    return part_of(".".join(file.relative_to(repository).with_suffix("").parts))


@pytest.fixture(scope="module")
def edges(repository: Path) -> list[tuple[str, str, str, str]]:
    """(place, importing part, imported module, imported part) of every import among our own modules."""
    return [
        (f"{file.relative_to(repository)}:{line}", own_part(file, repository), module, part_of(module))
        for file in sources(repository)
        for line, module in imports(file)
        if module.startswith("rlhf_ray.")
    ]


def test_every_part_has_a_layer(repository: Path, edges: list[tuple[str, str, str, str]]) -> None:
    parts = {own_part(file, repository) for file in sources(repository)} - {"__init__"}
    assert parts == set(LAYER)
    assert {imported for _, _, _, imported in edges} <= parts


def test_imports_point_down(edges: list[tuple[str, str, str, str]]) -> None:
    wrong = [
        f"{place}: {part} imports {module}"
        for place, part, module, imported in edges
        if part != imported and LAYER[imported] >= LAYER[part]
    ]
    assert wrong == []


def test_algorithms_know_nothing_but_types_roles_maths_and_configuration(
    edges: list[tuple[str, str, str, str]],
) -> None:
    found = {imported for _, part, _, imported in edges if part == "algorithms"}
    assert found == ALGORITHMS_MAY


def test_only_the_runtime_imports_ray(repository: Path) -> None:
    users = {
        str(file.relative_to(repository))
        for file in sources(repository)
        for _, module in imports(file)
        if module.partition(".")[0] == "ray"
    }
    assert users and all(user.startswith(RAY_HOME) for user in users), users


FORBIDDEN = {  # what runs or unpickles what a file says
    *("torch.load", "torch.save", "numpy.load", "np.load", "pandas.read_pickle", "eval", "exec"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "yaml.dump"),
}


def test_nothing_loads_a_pickle_or_more_than_plain_yaml(repository: Path) -> None:
    for file in sources(repository):
        names = {module.partition(".")[0] for _, module in imports(file)}
        assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, file
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in FORBIDDEN, f"{file}:{node.lineno}: {called}"
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), f"{file}:{node.value.lineno}"
