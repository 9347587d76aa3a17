"""Continuous batching beside running every batch to its longest row, on responses of geometric length.

    python benchmarks/ragged.py --size mini_xl --json ragged.json

Every step ends a row with the same probability, one over the mean length.  Three ways to answer the same prompts with
the same number of slots on one engine:

- continuous: all prompts in one call; a finished row's slot goes to the next prompt;
- finished rows dropped: one call a batch of as many prompts as slots, which shrinks and is not refilled;
- to the longest: the same batches with weights that never say EOS, each for as many steps as its longest row took in
  the first way, so that every step costs what it costs and nothing is done for rows that have ended.

Only the tokens of the first way count as useful.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from side_by_side import Report, interleave, parser, ratio, shrink, spread  # isort: skip
import numpy as np
from machine import DTYPES
from random_models import SIZES, random_engine, random_prompts

from rlhf_ray.generation import Sampling, row_uniforms


def ways(options: argparse.Namespace) -> tuple[dict[str, Callable[[], object]], list[int]]:
    """The three ways, each a call that answers every prompt, and the useful length of every response."""
    prompts = random_prompts(options.size, count=options.prompts, length=options.prompt)
    uniforms = np.stack([row_uniforms(0, 0, row, options.longest) for row in range(len(prompts))])
    shape = {"max_rows": options.slots, "dtype": DTYPES[options.dtype], "kind": options.engine}
    ending = random_engine(options.size, eos=1 / options.mean, **shape)
    endless = random_engine(options.size, **shape)
    sampling = Sampling(max_new_tokens=options.longest)
    lengths = [len(completion.tokens) for completion in ending.generate(prompts, uniforms, sampling)]
    batches = [slice(start, start + options.slots) for start in range(0, len(prompts), options.slots)]

    def dropped() -> None:
        for rows in batches:
            ending.generate(prompts[rows], uniforms[rows], sampling)

    def to_the_longest() -> None:
        for rows in batches:
            endless.generate(prompts[rows], uniforms[rows], Sampling(max_new_tokens=max(lengths[rows])))

    continuous = partial(ending.generate, prompts, uniforms, sampling)
    return {"continuous": continuous, "finished rows dropped": dropped, "to the longest": to_the_longest}, lengths


def main() -> None:
    """Measure the three ways in turn."""
    options_of = parser(__doc__ and __doc__.splitlines()[0])
    options_of.add_argument("--size", choices=SIZES, default="mini_xl")
    options_of.add_argument("--dtype", choices=DTYPES, default="float32")
    options_of.add_argument("--engine", default="auto", help="auto, native or torch")
    options_of.add_argument("--prompts", type=int, default=256, help="how many")
    options_of.add_argument("--slots", type=int, default=32)
    options_of.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    options_of.add_argument("--mean", type=int, default=40, help="mean length of a response without a limit")
    options_of.add_argument("--longest", type=int, default=128, help="tokens of a response at most")
    options = options_of.parse_args()
    shrink(options, size="tiny", prompts=48, slots=16, prompt=8, mean=6, longest=16)
    report = Report("ragged", options)
    calls, lengths = ways(options)
    times = interleave(calls, repetitions=options.repetitions)
    useful = sum(lengths)
    report.table(
        f"{options.size} {options.dtype}, {options.prompts} prompts, {options.slots} slots, lengths of mean "
        f"{useful / len(lengths):.1f}, at most {max(lengths)}",
        [
            {
                "way": name,
                "useful tokens/s": spread([useful / second for second in found]).median,
                "continuous is faster by": ratio(times["continuous"], found),
            }
            for name, found in times.items()
        ],
    )
    report.close()


if __name__ == "__main__":
    main()
