"""The field-by-field difference of two configurations, for a run that is resumed with another one."""

from __future__ import annotations

from typing import Any

_ABSENT = "(absent)"


def config_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line a field that differs, ``ppo.kl_coef: 0.05 -> 0.1``, in the order of names."""
    before, after = _flat(old), _flat(new)
    names = sorted(before.keys() | after.keys())
    pairs = [(name, before.get(name, _ABSENT), after.get(name, _ABSENT)) for name in names]
    return [f"{name}: {was} -> {now}" for name, was, now in pairs if was != now]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted name -> value as Python writes it: 1, 1.0 and True are different values."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = repr(value)
    return flat
