"""The command line of the doctor: what is to be said of a run's metrics, finding by finding."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_ray.config import repository_path
from rlhf_ray.doctor.watch import diagnose
from rlhf_ray.rundir.metrics import read_metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Print a run's findings; 4 when it has diverged, as the run's own exit code, 2 when there is no such run."""
    parser = argparse.ArgumentParser(prog="doctor.py", description="Say what a run's metrics show to be wrong.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, as checkpoints/ppo/default")
    folder = repository_path(parser.parse_args(argv).run)
    try:
        rows = read_metrics(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not rows:
        print(f"error: {folder} has no metrics.jsonl with a step in it; name a run's folder", file=sys.stderr)
        return 2
    findings = diagnose(rows)
    print(f"{folder}: {rows[-1]['step']} steps, {len(findings) or 'no'} finding{'s' * (len(findings) != 1)}")
    for finding in findings:
        first, last = finding.first_step, finding.last_step
        print(f"\n{finding.rule} ({finding.severity}), step {first}{f' to {last}' if last > first else ''}")
        print(f"  {finding.sentence}\n  likely: {finding.cause}\n  try: {finding.remedy}")
    return 4 if any(finding.severity == "divergence" for finding in findings) else 0
