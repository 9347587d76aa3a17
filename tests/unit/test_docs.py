"""The documentation names only code, commands, pages and tests that exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray import config
from rlhf_ray.config import load
from rlhf_ray.config.plan import PlanConfig

STAGES: dict[str, Any] = {
    "chat": config.ChatConfig,
    "evaluate": config.EvaluateConfig,
    "grow": config.GrowConfig,
    "monitor": config.MonitorConfig,
    "pipeline": config.PipelineConfig,
    "plan": PlanConfig,
    "ppo": config.PPOConfig,
    "pretrain": config.PretrainConfig,
    "reward_model": config.RewardModelConfig,
    "sft": config.SFTConfig,
}
WORDS = {"data", "doctor", "report", "tokenizer"}
"""Scripts that are given words and have no configuration."""
COMMAND = re.compile(r"python launch/(\w+)\.py([^`\n#]*)")
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


def pages(repository: Path) -> dict[Path, str]:
    """Every page for people, and its text."""
    files = [
        *repository.glob("*.md"),
        *(file for name in ("docs", "data") for file in (repository / name).glob("*.md")),
    ]
    return {file: file.read_text(encoding="utf-8") for file in files}


def test_every_command_is_taken_by_its_script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    found = [command for text in pages(repository).values() for command in COMMAND.findall(text.replace("\\\n", " "))]
    assert {script for script, _ in found} == STAGES.keys() | WORDS
    for script, rest in found:
        if script in STAGES:
            load(STAGES[script], shlex.split(rest.replace("...", "")))


def anchors(text: str) -> set[str]:
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_to_a_file_and_a_heading_and_every_test_is_there(repository: Path) -> None:
    known = pages(repository)
    tests = [file.read_text(encoding="utf-8") for file in (repository / "tests").rglob("*.py")]
    names = {file.stem for file in (repository / "tests").rglob("*.py")}
    names |= {name for text in tests for name in re.findall(r"def (test_\w+)", text)}
    for page, text in known.items():
        for link in re.findall(r"\]\((?!http)([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists() and (not anchor or anchor in anchors(known[file])), f"{page.name}: {link}"
        assert set(re.findall(r"\btest_\w+", text)) <= names, page.name
