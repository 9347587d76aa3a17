"""A short chaos: every part of a run is killed in turn, and the run ends as one that was left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_a_run_whose_parts_are_killed_ends_as_one_left_alone(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "chaos.json"
    line = [sys.executable, str(repository / "benchmarks" / "chaos.py"), "--quick", "--json", str(file)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    hits = {row["part"]: row["kill -9"] + row["SIGSTOP"] for row in rows if "part" in row}
    assert len(hits) == 5 and sum(hits.values()) >= 4
    ends = {row["what"]: row["equal"] for row in rows if "what" in row}
    assert all(ends.values()) and any(what.startswith("model.safetensors, SHA-256") for what in ends)
