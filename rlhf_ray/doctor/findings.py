"""What the doctor says of a run: a symptom, over which steps, why it may be there and what may help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["note", "warning", "divergence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One rule that fired, over a stretch of steps."""

    rule: str
    first_step: int
    last_step: int
    """The newest step that shows the symptom; equal to ``first_step`` when the finding has just begun."""
    severity: Severity
    """note: worth knowing; warning: look at it; divergence: what follows is not worth training."""
    sentence: str
    """What was seen at ``first_step``, with its numbers."""
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.rule} at step {self.first_step}: {self.sentence}; likely {self.cause}; {self.remedy}"
