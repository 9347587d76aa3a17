"""What the launch scripts share: read the configuration, run, and turn what went wrong into one line.

Exit codes: 0 done, 2 something that the user can mend, 3 workers died too often, with everything saved, 4 the run
diverged, 130 stopped by a signal with everything saved.

Left out on purpose: torch, until the configuration is known to be good, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from rlhf_ray import console
from rlhf_ray.config import Config, PipelineConfig, PPOConfig, load, repository_path
from rlhf_ray.config.loader import REPOSITORY, C
from rlhf_ray.config.presets import hardware_preset, preset_file
from rlhf_ray.config.run_fields import RunFields
from rlhf_ray.failures import Diverged, GaveUp
from rlhf_ray.runtime.environment import check_lasting

SHORT = {"--quiet": "--show=lines", "--json": "--show=json"}
SHORT_OF_PPO = {"--micro-batch-tokens": "--ppo.micro-batch-tokens"}
"""Flags that the other stages have under the short name."""


def main(
    config_class: type[C],
    description: str,
    preset_stage: str | None,
    run: Callable[[C], object],
    argv: Sequence[str] | None = None,
) -> int:
    """Load a script's configuration and run it; returns the exit code.

    ``run`` imports what it needs itself.  Without ``--config`` the preset of ``preset_stage`` that fits
    the hardware lies under the flags, and the first line says so.
    """
    # Threads that meet after every small product must not sleep at once, which costs two thirds of the speed of a small
    # model, nor spin for a millisecond, which makes them 10 times slower on a machine that does anything else.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    arguments = _in_full(config_class, sys.argv[1:] if argv is None else argv)
    named = any(argument == "--config" or argument.startswith("--config=") for argument in arguments)
    preset = None if preset_stage is None or named else preset_file(preset_stage, hardware_preset())
    try:
        config = load(config_class, arguments, description=description, preset=preset)
        if isinstance(config, RunFields):
            console.show(config.show)
        if preset is not None:
            console.say(f"preset: {preset.relative_to(REPOSITORY)} (what fits this machine; --config takes another)")
        _check_lasting(config)
        run(config)
    except ValueError as error:
        return _fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    except GaveUp as error:
        return _fail(str(error), code=3)
    except Diverged as error:
        return _fail(str(error), code=4)
    except KeyboardInterrupt as error:
        print(f"\n{str(error) or 'stopped'}", file=sys.stderr, flush=True)
        return 130
    return 0


def _in_full(config_class: type[Config], words: Sequence[str]) -> list[str]:
    """A command line without short forms."""
    short = {**SHORT, **(SHORT_OF_PPO if issubclass(config_class, PPOConfig) else {})}
    split = [word.partition("=") for word in words]
    return ["".join((short.get(name, name), *value)) for name, *value in split]


def _check_lasting(config: Config) -> None:
    """Raise ValueError when what a run leaves behind would go with the job that it runs in."""
    mirrored = isinstance(config, RunFields) and config.mirror
    if isinstance(config, RunFields | PipelineConfig) and not mirrored:
        check_lasting(repository_path(config.checkpoints))


def _fail(text: str, *, code: int = 2) -> int:
    print(
        "error: " + "; ".join(line.strip() for line in text.split("\n") if line.strip()),
        file=sys.stderr,
        flush=True,
    )
    return code
