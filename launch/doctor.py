"""What is wrong with a run, finished or not: doctor.py RUN prints what the doctor finds in its metrics."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
