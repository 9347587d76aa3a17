"""How a configuration is put together: the class's defaults, then a YAML file, then the command line.

``load(PPOConfig, argv)`` understands ``--config FILE`` and one kebab-case flag per field, nested by dots
(``--ppo.lr 1e-5``); a list takes several values (``--compare A B``).  A key or flag that no field has is an
error that names the nearest one that exists.

Left out on purpose: environment variables and interpolation; what a run used is what its config.yaml says.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from rlhf_ray.config.secrets import without_secrets

REPOSITORY = Path(__file__).resolve().parents[2]


class ConfigError(ValueError):
    """A configuration that the user can mend, in one line: the field, its value and what is allowed."""


class Section(BaseModel):
    """A group of fields inside a configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Config(BaseSettings):
    """A stage's whole configuration."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str="null",
        protected_namespaces=(),
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the program passes in: the environment and .env files are never read."""
        return (init_settings,)

    def resolved(self, *, without: Collection[str] = ()) -> dict[str, Any]:
        """Every field as plain YAML values without secrets, as saved in the run's config.yaml.

        Left out are those named in ``without``, a section's as ``memory.sleep``.
        """
        return _but(without_secrets(self.model_dump(mode="json")), without)


C = TypeVar("C", bound=Config)


def _but(values: dict[str, Any], names: Collection[str], prefix: str = "") -> dict[str, Any]:
    """The values whose dotted names are not among the names."""
    return {
        name: _but(value, names, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in values.items()
        if prefix + name not in names
    }


def repository_path(path: str | Path) -> Path:
    """The path itself when absolute, else in the current folder if it exists there, else in the repository.

    So every script can be started from any folder and still finds ``data/`` and ``checkpoints/``.
    """
    path = Path(path).expanduser()
    if path.is_absolute() or path.exists():
        return path.absolute()
    return REPOSITORY / path


class _Parser(argparse.ArgumentParser):
    """An argument parser whose one-line errors name the nearest known flag."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            word = message.removeprefix(prefix).split()[0].split("=")[0]
            kind = "unknown flag" if word.startswith("-") else "unexpected argument"
            message = f"{kind} {word}{_did_you_mean(word, known)}"
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"; the nearest one is {near[0]}" if near else "; see --help"


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, the second on top of the first; lists are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's top-level mapping; ConfigError naming file and line when it is none."""
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} must hold a mapping of field names to values")
    return _underscored(values)


def _underscored(values: dict[str, Any]) -> dict[str, Any]:
    return {
        str(key).replace("-", "_"): _underscored(value) if isinstance(value, dict) else value
        for key, value in values.items()
    }


def _one_line(error: ValidationError, config_class: type[BaseModel], origin: str) -> str:
    """The first fault of a validation as 'field = value: reason'."""
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        model: Any = config_class
        for part in fault["loc"][:-1]:
            fields = getattr(model, "model_fields", {})
            model = fields[part].annotation if part in fields else None
        known = list(getattr(model, "model_fields", {}))
        return f"{origin}unknown key {where}{_did_you_mean(str(fault['loc'][-1]), known)}"
    reason = fault["msg"].removeprefix("Value error, ")
    value = fault.get("input")
    shown = f" = {value!r}" if where and not isinstance(value, dict) else ""
    return f"{origin}{where}{shown}: {reason}" if where else f"{origin}{reason}"


def build(config_class: type[C], values: dict[str, Any], *, origin: str = "") -> C:
    """Validate plain values; ConfigError in one line."""
    try:
        return config_class(**values)
    except ValidationError as error:
        raise ConfigError(_one_line(error, config_class, origin)) from error


def _one_value_each(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """``--compare A B`` as ``--compare A --compare B`` for every flag whose field is a list."""
    lists = {
        option
        for action in parser._actions
        if isinstance(action, argparse._AppendAction)
        for option in action.option_strings
    }
    spread: list[str] = []
    flag, has_value = "", False
    for word in argv:
        if word.startswith("-") and len(word) > 1:
            flag, has_value = (word if word in lists else ""), False
        elif flag and has_value:
            spread.append(flag)
        else:
            has_value = True
        spread.append(word)
    return spread


def _command_line(config_class: type[C], argv: Sequence[str], description: str) -> dict[str, Any]:
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", action="append", help="YAML overrides, the last one wins")
    source: CliSettingsSource[Any] = CliSettingsSource(
        config_class,
        root_parser=parser,
        parse_args_method=lambda parser, args=None, namespace=None: parser.parse_args(args, namespace),
        formatter_class=argparse.HelpFormatter,
    )
    words = _one_value_each(parser, argv)
    given = source(args=words)()
    known, _ = parser.parse_known_args(words)
    return {**given, "config": known.config or []}


def parse(
    config_class: type[C], argv: Sequence[str] | None, *, description: str = ""
) -> tuple[list[Path], dict[str, Any]]:
    """The --config files and the flags of a command line; an unknown flag ends the process with exit code 2."""
    flags = _command_line(config_class, sys.argv[1:] if argv is None else argv, description)
    return [repository_path(name) for name in flags.pop("config")], flags


def load(
    config_class: type[C],
    argv: Sequence[str] | None = None,
    *,
    description: str = "",
    preset: Path | None = None,
) -> C:
    """The configuration of a script: defaults < preset YAML (only without --config) < --config files < flags.

    Raises ConfigError for a value that does not fit; an unknown flag ends the process with exit code 2.
    """
    files, flags = parse(config_class, argv, description=description)
    values: dict[str, Any] = {}
    for file in files or ([preset] if preset else []):
        values = merge(values, read_yaml(file))
        build(config_class, values, origin=f"{file}: ")
    return build(config_class, merge(values, flags))
