"""Look at data files before they are trained on: data.py check FILE [FILE ...] (--help says how)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray.lint import main

if __name__ == "__main__":
    sys.exit(main())
