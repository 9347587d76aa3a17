"""How good a reward model's margins are: accuracy, accuracy by margin, calibration.

The margin of a pair is r_chosen - r_rejected; the model is right when it is above 0, so a tie is wrong.
It prefers one of the two with confidence sigmoid(|margin|), between 0.5 and 1; it is calibrated when it is
right as often as it is confident (Guo et al. 2017).

Left out on purpose: margins that the data states, which belong to the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Pairs of about one confidence."""

    pairs: int
    confidence: float
    """Mean predicted probability of being right."""
    accuracy: float
    """Share that is right."""


def accuracy(margins: Tensor) -> float:
    """Share of margins (N,) above 0."""
    return float((margins > 0).double().mean())


def accuracy_by_decile(margins: Tensor, bins: int = 10) -> list[float]:
    """Accuracy of each tenth of the pairs, from the smallest |margin| to the largest; fewer when there are
    few pairs.
    """
    order = margins.abs().argsort(stable=True)
    return [accuracy(part) for part in margins[order].tensor_split(min(bins, len(margins)))]


def calibration(margins: Tensor, bins: int = 10) -> list[CalibrationBin]:
    """Equal-width bins of confidence from 0.5 to 1, empty ones left out."""
    confidence = margins.double().abs().sigmoid()  # (N,)
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)  # (N,)
    return [
        CalibrationBin(
            pairs=int((index == b).sum()),
            confidence=float(confidence[index == b].mean()),
            accuracy=accuracy(margins[index == b]),
        )
        for b in range(bins)
        if bool((index == b).any())
    ]


def expected_calibration_error(bins: list[CalibrationBin]) -> float:
    """Mean |confidence - accuracy| over the pairs (Naeini et al. 2015)."""
    pairs = sum(b.pairs for b in bins)
    return sum(b.pairs * abs(b.confidence - b.accuracy) for b in bins) / pairs


def pair_loss(margins: Tensor) -> float:
    """Mean -log sigmoid of margins (N,), in nats: 0.693 for a model that can't tell."""
    return float(F.softplus(-margins.double()).mean())


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of values (N,)."""
    return float(values.double().std()) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def mean_and_std(values: Tensor) -> tuple[float, float]:
    """Mean and biased standard deviation of values (N,)."""
    std, mean = torch.std_mean(values.double(), correction=0)
    return float(mean), float(std)
