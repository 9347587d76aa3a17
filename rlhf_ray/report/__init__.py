"""A run as a page: one HTML file with what was run, whether it learned, curves, answers and warnings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_ray.rundir.files import replace_text
from rlhf_ray.rundir.metrics import read_metrics

FILE_NAME = "report.html"


def report_run(folder: Path, say: Callable[[str], object]) -> None:
    """Write the report of a run that has ended into its folder and say where, if it has logged anything."""
    if read_metrics(folder):
        say(f"report: {write_report([folder])}")


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of one run into its folder, or of some to ``output``, and return where.

    ValueError when a folder holds no run or the runs are of different stages.
    """
    from rlhf_ray.report.page import page  # matplotlib takes a second, which --help and a run's start do without
    from rlhf_ray.report.record import read_record

    output = output or folders[0] / FILE_NAME
    text = page([read_record(folder) for folder in folders])
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(output, text)
    return output
