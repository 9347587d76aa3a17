"""Configurations field by field: under dotted names, and what differs between two of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ABSENT = "(absent)"


def config_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line a field that differs, ``ppo.kl_coef: 0.05 -> 0.1``, in the order of names; 1, 1.0 and True do differ."""
    before, after = ({name: repr(value) for name, value in flat(config).items()} for config in (old, new))
    names = sorted(before.keys() | after.keys())
    pairs = [(name, before.get(name, _ABSENT), after.get(name, _ABSENT)) for name in names]
    return [f"{name}: {was} -> {now}" for name, was, now in pairs if was != now]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; an empty section is a value of its own."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
