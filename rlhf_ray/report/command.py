"""The command line of the report: runs in, one HTML file out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rlhf_ray import console
from rlhf_ray.config import repository_path
from rlhf_ray.report import FILE_NAME, write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="report.py", description="Show a run as one HTML file, or several of a stage over each other."
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, such as checkpoints/ppo/default"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the file to write (default: {FILE_NAME} in the run's folder; of several runs, in the current one)",
    )
    args = parser.parse_args(argv)
    output = args.output or (Path(FILE_NAME).absolute() if len(args.runs) > 1 else None)
    try:
        written = write_report([repository_path(run) for run in args.runs], output)
    except (ValueError, OSError) as error:
        console.error(str(error))
        return 2
    console.say(f"wrote {written}")
    return 0
