"""Following a run: which rules fire at each step, and how single steps become findings.

The same code watches a run while it trains and looks at a finished one, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from rlhf_ray.doctor.findings import Finding
from rlhf_ray.doctor.history import History, Row
from rlhf_ray.doctor.rules import RULES, TIMED, Rule

PAUSE = 5
"""Steps for which a symptom may be away and still be the same finding."""


class Doctor:
    """What is to be said of a run, step by step."""

    def __init__(self, history: Iterable[Row] = ()) -> None:
        """``history`` are the rows so far of a run that goes on."""
        self._history = History()
        self._findings: list[Finding] = []
        self.present: list[Finding] = []
        """What the newest step that was told of shows."""
        for row in history:
            self.see(row)

    def see(self, row: Row) -> list[Finding]:
        """Take note of a row of metrics with its ``step``; returns what it shows, begun now or before."""
        self._history.add(row)
        said = ((rule, rule.symptom(self._history)) for rule in RULES)
        return [self._note(rule, int(row["step"]), sentence) for rule, sentence in said if sentence]

    def tell(self, step: int, metrics: Mapping[str, float], say: Callable[[str], object]) -> dict[str, float]:
        """`see` a step's metrics and say what has begun.

        Returns ``doctor/<rule>`` = 1 for all that it shows, ``perf/doctor/<rule>`` where a rule reads the clock, which
        no two runs share.
        """
        self.present = self.see({"step": step, **metrics})
        for finding in self.present:
            if finding.first_step == step:
                say(f"doctor: {finding}")
        return {f"{'perf/' if finding.rule in TIMED else ''}doctor/{finding.rule}": 1.0 for finding in self.present}

    def _note(self, rule: Rule, step: int, sentence: str) -> Finding:
        """A finding that goes on, or a new one."""
        for place, finding in enumerate(self._findings):
            if finding.rule == rule.name and step - finding.last_step <= PAUSE:
                self._findings[place] = replace(finding, last_step=step)
                return self._findings[place]
        finding = Finding(
            rule=rule.name,
            first_step=step,
            last_step=step,
            severity=rule.severity,
            sentence=sentence,
            cause=rule.cause,
            remedy=rule.remedy,
        )
        self._findings.append(finding)
        return finding

    @property
    def findings(self) -> list[Finding]:
        """All so far, in the order in which they began."""
        return list(self._findings)


def diagnose(history: Iterable[Row]) -> list[Finding]:
    """What is to be said of the rows of a run's metrics.jsonl, finished or not, in the order in which it began."""
    return Doctor(history).findings
