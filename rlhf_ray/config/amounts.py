"""Amounts of memory as people write them: 6GB, 5.5 GiB, 800MB."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
_AMOUNT = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})")


def in_bytes(amount: str) -> int:
    """Bytes of an amount; ValueError when it is none."""
    found = _AMOUNT.fullmatch(amount)
    if not found:
        raise ValueError(f"give a number and one of {', '.join(UNITS)}, such as 6GB")
    return int(float(found[1]) * UNITS[found[2]])


def _checked(amount: str) -> str:
    in_bytes(amount)
    return amount


Amount = Annotated[str, AfterValidator(_checked)]
"""GB are billions of bytes; a card that is sold with 6 GB has 6 GiB, of which the desktop takes some."""
