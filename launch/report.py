"""Show a run as one HTML file, or several over each other (--help says how)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray.report.command import main

if __name__ == "__main__":
    sys.exit(main())
