"""Memory that does not suffice: what is said of it, or half as much at once, where that is wished for.

torch, numpy and Python have four ways to say it.  Here they are one error that names role, phase, the bytes that were
asked for and the settings to change.  A `Portion` is what goes through a model at once: with half of it the same work
is done again, and as neither rows nor gradients depend on it, the result is the same but for rounding.

Left out on purpose: processes that the system ends because memory is short; those say nothing, and are deaths.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

ERRORS = (RuntimeError, MemoryError)
"""What is raised where memory does not suffice, and elsewhere."""
SIGNS = ("DefaultCPUAllocator", "error: out of memory", "ALLOC_FAILED")
"""What a RuntimeError of that kind says: of the host, of the card's driver, of its libraries."""
ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) ?(bytes|[KMGTP]iB)", re.IGNORECASE)
UNITS = {"bytes": 1} | {f"{letter}iB": 1024**power for power, letter in enumerate("KMGTP", 1)}
MEMINFO = Path("/proc/meminfo")

SCORED = {
    "start": "--memory.frozen int8",
    "judge": "--memory.frozen int8 or a shorter --generation.response-length",
}
TRAINED = {
    "start": "a smaller model or, for SFT and reward models, --lora.rank 16",
    "learn": "--memory.activation-checkpointing or a shorter --max-length",
    "optimiser step": "--memory.optimizer-bits 8 or, for SFT and reward models, --lora.rank 16",
    "evaluate": "a shorter --max-length",
    "save": "--memory.optimizer-bits 8 or, for SFT and reward models, --lora.rank 16",
}
ADVICE: Mapping[str, Mapping[str, str]] = {
    "rollout": {
        "start": "--generation.dtype bfloat16 or fewer --num-rollout-workers",
        "generate": "--generation.dtype bfloat16 or a shorter --generation.response-length",
        "publish": "--generation.dtype bfloat16 or --lora.rank 16",
    },
    "reward": SCORED,
    "reference": SCORED,
    "learner": {
        "start": "--lora.rank 16 or a smaller model",
        "judge": "--ppo.dtype bfloat16 or a shorter --generation.response-length",
        "learn": "--memory.activation-checkpointing or a shorter --generation.response-length",
        "optimiser step": "--memory.optimizer-bits 8 or --lora.rank 16",
        "publish": "--generation.dtype bfloat16 or --lora.rank 16",
        "save": "--memory.optimizer-bits 8 or --lora.rank 16",
    },
    "pretrained": TRAINED,
    "sft": TRAINED,
    "reward_model": TRAINED,
}
"""What needs less, beside a smaller portion, by role (or stage) and phase."""


class OutOfMemory(ValueError):  # noqa: N818
    """A role's memory does not suffice; a user can mend it, and the message says how."""


@dataclass(slots=True, kw_only=True)
class Portion:
    """How much goes through a model at once."""

    setting: str
    """The configuration's name for it."""
    size: int
    by_tokens: bool = False
    """Whether it counts tokens; else it counts rows."""
    least: int = 1
    """Rows with which nothing is saved by fewer."""
    auto: bool = False
    """Whether it is halved where memory does not suffice."""
    asked: int = field(init=False)
    """What it was at first."""

    def __post_init__(self) -> None:
        self.asked = self.size

    @property
    def rows(self) -> int:
        """Rows, where tokens do not decide."""
        return 0 if self.by_tokens else self.size

    @property
    def tokens(self) -> int:
        """Tokens; 0 where rows decide."""
        return self.size if self.by_tokens else 0

    @property
    def reduced(self) -> dict[str, int]:
        """Setting and size, if that is less than it was at first."""
        return {self.setting: self.size} if self.size < self.asked else {}

    def attempt(
        self, work: Callable[[], T], lengths: Callable[[], Tensor], undo: Callable[[], object] = lambda: None
    ) -> T:
        """What ``work`` returns, done again with half as much at once, after ``undo``, until memory suffices.

        ``lengths`` gives the tokens (B,) of its rows.  What work raises when it can't be less is raised.
        """
        while True:
            try:
                return work()
            except ERRORS as error:
                if not (self.auto and _is_shortage(error) and self._halve(lengths())):
                    raise
            undo()  # outside of the handler: the error holds the frames, and they what was computed
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _halve(self, lengths: Tensor) -> bool:
        """Half of what these rows fill, where that makes a pass smaller; no row is ever cut."""
        most, least = (int(lengths.sum()), int(lengths.max())) if self.by_tokens else (len(lengths), self.least)
        filled = min(self.size, most)
        if filled <= least:
            return False
        self.size = max(least, filled // 2)
        return True


def micro_batch(rows: int, tokens: int = 0, *, section: str = "", auto: bool = False) -> Portion:
    """What a forward pass takes by a configuration's ``section``: rows, or tokens where they are not 0."""
    kind = "tokens" if tokens else "size"
    return Portion(setting=f"{section}micro_batch_{kind}", size=tokens or rows, by_tokens=tokens > 0, auto=auto)


@contextmanager
def named(role: str, phase: str, portion: Portion | None = None) -> Iterator[None]:
    """Raise `OutOfMemory` for whatever says inside that memory does not suffice."""
    try:
        yield
    except ERRORS as error:
        if not _is_shortage(error):
            raise
        raise OutOfMemory(_message(role, phase, portion, error)) from error


def reduction(role: str, setting: str, size: int) -> str:
    """A line on a portion that was halved."""
    return f"{role}: memory did not suffice; done again with {setting} {size}, which it stays at"


def asked_bytes(text: str) -> int | None:
    """The bytes that an error says were asked for; None when it does not."""
    found = ASKED.search(text)
    return round(float(found[1]) * UNITS[found[2]]) if found else None


def _is_shortage(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


def _message(role: str, phase: str, portion: Portion | None, error: BaseException) -> str:
    asked = asked_bytes(str(error))
    wanted = "an unknown number of bytes" if asked is None else f"{asked:,} bytes"
    on_card = isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error) or "CUBLAS" in str(error)
    ways = [ADVICE[role][phase]]
    if portion and portion.size > portion.least:
        ways.insert(0, f"a smaller --{portion.setting.replace('_', '-')} ({portion.size} now)")
        ways += [] if portion.auto else ["--auto-micro-batch, which halves it by itself"]
    where = "GPU" if on_card else "host"
    return f"{role}, {phase}: out of {where} memory, {wanted} asked for{_there(on_card)}; take {', or '.join(ways)}"


def _there(on_card: bool) -> str:
    """What there is of the memory, where it can be told."""
    if on_card and torch.cuda.is_initialized():
        (free, total), own = torch.cuda.mem_get_info(), torch.cuda.memory_reserved()
        limit = torch.cuda.get_per_process_memory_fraction() * total
        return f", {free:,} free; this process has {own:,} of {limit:,.0f} that it may take"
    if on_card or not MEMINFO.is_file():
        return ""
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines())
    return f", {1024 * int(fields['MemAvailable'].split()[0]):,} available"
