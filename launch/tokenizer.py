"""Train a tokenizer, or use one: tokenizer.py train | encode | decode (--help says how)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray.tokenizer.command import main

if __name__ == "__main__":
    sys.exit(main())
