"""The doctor: plain rules over a run's metrics, each with a sentence, a likely cause and a remedy (docs/DOCTOR.md)."""

from __future__ import annotations

from rlhf_ray.doctor.findings import Finding
from rlhf_ray.doctor.watch import Doctor, diagnose

__all__ = ["Doctor", "Finding", "diagnose"]
