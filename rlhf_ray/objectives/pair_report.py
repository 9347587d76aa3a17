"""What is said about a finished reward model, beside what simpler rankers reach."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlhf_ray.objectives import pair_metrics
from rlhf_ray.objectives.base import Report
from rlhf_ray.objectives.baselines import BagOfWords, Pair, length_baseline


def pair_report(
    *,
    margins: Tensor | None,
    train: Sequence[Pair],
    held_out: Sequence[Pair],
    fresh: Tensor | None,
    gain: float,
    bias: float,
) -> Report:
    """Metrics and lines from the margins (N,) of the held-out pairs and the scores (M,) of fresh samples."""
    parts = []
    if margins is None:
        parts.append(Report(metrics={}, lines=["no pair held out: no accuracy to report"]))
    else:
        parts += [_accuracy(margins), _calibration(margins), _baselines(train, held_out)]
    if fresh is not None:
        parts.append(_normalisation(fresh, gain, bias))
    return Report(
        metrics={name: value for part in parts for name, value in part.metrics.items()},
        lines=[line for part in parts for line in part.lines],
    )


def _accuracy(margins: Tensor) -> Report:
    accuracy, loss = pair_metrics.accuracy(margins), pair_metrics.pair_loss(margins)
    ties = int((margins == 0).sum())
    deciles = pair_metrics.accuracy_by_decile(margins)
    metrics = {"eval/accuracy": accuracy, "eval/loss": loss, "eval/ties": float(ties)}
    return Report(
        metrics=metrics | {f"eval/accuracy_decile_{d}": value for d, value in enumerate(deciles)},
        lines=[
            f"held-out accuracy {accuracy:.3f} on {len(margins)} pairs ({ties} ties, counted as wrong), "
            f"loss {loss:.4f}",
            "  by margin, smallest tenth first: " + " ".join(f"{value:.2f}" for value in deciles),
        ],
    )


def _calibration(margins: Tensor) -> Report:
    bins = pair_metrics.calibration(margins)
    error = pair_metrics.expected_calibration_error(bins)
    metrics = {"eval/ece": error}
    for number, part in enumerate(bins):
        metrics |= {
            f"eval/calibration_{number}_confidence": part.confidence,
            f"eval/calibration_{number}_accuracy": part.accuracy,
            f"eval/calibration_{number}_pairs": float(part.pairs),
        }
    shown = ", ".join(f"{part.confidence:.2f} -> {part.accuracy:.2f} ({part.pairs})" for part in bins)
    return Report(
        metrics=metrics,
        lines=[f"  calibration, confidence -> accuracy (pairs): {shown}; expected error {error:.3f}"],
    )


def _baselines(train: Sequence[Pair], held_out: Sequence[Pair]) -> Report:
    length = length_baseline(train, held_out)
    words = BagOfWords(train).accuracy(held_out)
    return Report(
        metrics={
            "eval/chosen_is_longer": length.chosen_is_longer,
            "eval/baseline_length": length.accuracy,
            "eval/baseline_bag_of_words": words,
        },
        lines=[
            f"  beside it: bag of words {words:.3f}, taking the {length.prefers} one {length.accuracy:.3f} "
            f"(the chosen one is longer in {length.chosen_is_longer:.3f})"
        ],
    )


def _normalisation(fresh: Tensor, gain: float, bias: float) -> Report:
    mean, std = pair_metrics.mean_and_std(fresh)
    error = pair_metrics.standard_error(fresh)
    return Report(
        metrics={
            "eval/reward_gain": gain,
            "eval/reward_bias": bias,
            "eval/fresh_mean": mean,
            "eval/fresh_std": std,
            "eval/fresh_standard_error": error,
        },
        lines=[
            f"normalised by gain {gain:.4g}, bias {bias:.4g}; "
            f"on {len(fresh)} fresh samples of the SFT policy "
            f"mean {mean:+.3f} (standard error {error:.3f}), deviation {std:.3f}"
        ],
    )
