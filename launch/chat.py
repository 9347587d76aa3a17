"""Talk to a checkpoint in the terminal, or to several side by side."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf_ray.cli import main
from rlhf_ray.config import ChatConfig


def run(config: ChatConfig) -> None:
    """Talk until the person has had enough."""
    from rlhf_ray.chat.terminal import chat

    chat(config)


if __name__ == "__main__":
    sys.exit(main(ChatConfig, __doc__, None, run))
