"""Reward models on real preference pairs, beside the floor that counting words reaches.

    python benchmarks/real_preferences.py pairs.jsonl --policy checkpoints/sft/sgd [--seeds 0 1 2]

For each seed the pairs are split by prompt, a reward model is trained from the policy, and both rankers are measured on
the same held-out pairs.  The newest checkpoint counts, never the best on the held-out pairs.  Further flags go to the
reward model's configuration (``--epochs 3 --optimiser.lr 3e-4``).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bag_of_words import chosen_is_longer, fit_and_score

from rlhf_ray import console
from rlhf_ray.config import RewardModelConfig, load
from rlhf_ray.data.readers import read_pairs
from rlhf_ray.data.splits import split_by_prompt
from rlhf_ray.run import read_metrics
from rlhf_ray.stages import reward_model

PENALTIES = (0.1, 1.0, 10.0)


def held_out_accuracy(options: argparse.Namespace, further: list[str], seed: int) -> float:
    """Train one reward model; its accuracy on the held-out pairs."""
    run = f"{options.pairs.name.split('.')[0]}-{seed}"
    arguments = [
        *("--data", str(options.pairs), "--policy", str(options.policy), "--run", run, "--seed", str(seed)),
        *("--held-out", str(options.held_out), "--checkpoints", str(options.checkpoints)),
        *("--normalise-samples", "0", *further),
    ]
    config = load(RewardModelConfig, arguments)
    reward_model(config)
    rows = read_metrics(options.checkpoints / "reward_model" / run)
    return float(next(row["eval/accuracy"] for row in reversed(rows) if "eval/accuracy" in row))


def main() -> None:
    """Print accuracies by seed, mean and spread, of reward model and word counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints/real"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=float, default=0.2)
    options, further = parser.parse_known_args()
    pairs = read_pairs(options.pairs)
    splits = [split_by_prompt(pairs, options.held_out, seed) for seed in options.seeds]
    rankers = {"reward model": [held_out_accuracy(options, further, seed) for seed in options.seeds]}
    for c in PENALTIES:
        rankers[f"bag of words, C {c:g}"] = [fit_and_score(train, held_out, c=c) for train, held_out in splits]
    rankers["chosen is longer"] = [chosen_is_longer(held_out) for _, held_out in splits]
    console.table(
        f"{options.pairs.name}: {len(pairs)} pairs, {options.held_out:.0%} held out by prompt",
        ["ranker", *(f"seed {seed}" for seed in options.seeds), "mean", "spread"],
        [
            [name, *(f"{a:.3f}" for a in values), f"{statistics.mean(values):.3f}", f"{statistics.stdev(values):.3f}"]
            for name, values in rankers.items()
        ],
    )


if __name__ == "__main__":
    main()
