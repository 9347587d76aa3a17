"""Secrets that hide in URLs, kept out of saved configurations, logs and errors."""

from __future__ import annotations

import re
from typing import Any

_USER = re.compile(r"(?<=://)[^/\s]*@")
_OPTION = re.compile(r"([?&][^=&\s]*(?:token|key|secret|passw|sig|auth|cred)[^=&\s]*=)[^&\s#]*", re.IGNORECASE)


def redacted(text: str) -> str:
    """The text with ``***`` for the user part of its URLs, and for options such as ``?token=`` or ``&api_key=``."""
    return _OPTION.sub(r"\1***", _USER.sub("***@", text))


def without_secrets(value: Any) -> Any:
    """Nested plain values with every string redacted."""
    if isinstance(value, dict):
        return {name: without_secrets(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return redacted(value) if isinstance(value, str) else value
