"""Estimators of the divergence between policy and reference, and controllers of its price in the reward.

With d = logpi - logref of a token sampled from pi, k1, k2 and k3 are Schulman's estimators of KL(pi || ref)
("Approximating KL Divergence", 2020).  As terms of a loss they differ: E grad k1 = 0, E grad k2 = grad KL(pi
|| ref) and E grad k3 = grad KL(ref || pi), where the gradient runs through logpi alone.

Left out on purpose: full-vocabulary divergences, which would need both models' logits at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from rlhf_ray.ops.masked import mask_out

Estimator = Callable[[Tensor], Tensor]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this, either way, before exponentiation: e^20 is 4.9e8, far from overflow."""


def k1(log_ratio: Tensor) -> Tensor:
    """d: unbiased, negative for some tokens; the one that shapes rewards."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """d^2 / 2: biased, never negative; its gradient is that of KL(pi || ref)."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased and never negative; its gradient is that of KL(ref || pi)."""
    return torch.expm1((-log_ratio).clamp(max=MAX_LOG_RATIO)) + log_ratio


ESTIMATORS: dict[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3}
"""Each is 0 where the models agree."""


def kl_terms(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: Estimator = k1) -> Tensor:
    """Estimate the divergence of each token, (B, T) nats, 0 outside mask; all arguments are (B, T)."""
    return estimator(mask_out(logprobs - ref_logprobs, mask))


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: Estimator = k1) -> Tensor:
    """Sum the divergence over each row, (B,) nats; the arguments are (B, T)."""
    return kl_terms(logprobs, ref_logprobs, mask, estimator).sum(1)


class KLController(Protocol):
    """Sets beta, the price of one nat, from batch to batch."""

    @property
    def coef(self) -> float:
        """Beta for the next batch."""
        ...

    def update(self, kl: float, batch_size: int) -> None:
        """Take note of a batch's mean sequence KL (nats, k1) over ``batch_size`` episodes."""
        ...

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must keep."""
        ...

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from a checkpoint."""
        ...


LEAST_RAISED = 0.01
"""What a beta of 0 counts as when it is to be raised."""


def raised(coef: float, factor: float, times: int) -> float:
    """Beta after so many rollbacks, each of which multiplies it by ``factor``."""
    return max(coef, LEAST_RAISED) * factor**times if times else coef


def _check_coef(coef: float) -> None:
    if not (math.isfinite(coef) and coef >= 0):
        raise ValueError(f"kl_coef is {coef}; it must be a finite number of at least 0")


class FixedKL:
    """Beta as configured, for the whole run."""

    __slots__ = ("_coef",)

    def __init__(self, coef: float) -> None:
        """Raises ValueError when coef is negative or not finite."""
        _check_coef(coef)
        self._coef = float(coef)

    @property
    def coef(self) -> float:
        """Beta for the next batch."""
        return self._coef

    def update(self, kl: float, batch_size: int) -> None:
        """Change nothing."""

    def state_dict(self) -> dict[str, float]:
        """Return beta, so that a run changed to an adaptive controller goes on from it."""
        return {"coef": self._coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Change nothing: a fixed beta is always the configuration's, in a resumed run too."""


class AdaptiveKL:
    """Beta raised while KL is above its target and lowered while below.

    beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * batch_size / horizon): Ziegler et al. 2019,
    section 2.2, with the horizon of openai/lm-human-preferences.
    """

    __slots__ = ("_coef", "horizon", "target")

    MAX_ERROR = 0.2
    """Bound of the proportional error, from the same paper."""

    def __init__(self, coef: float, *, target: float, horizon: float) -> None:
        """Steer to ``target`` nats a sequence over ``horizon`` episodes; ValueError unless both are > 0."""
        _check_coef(coef)
        for name, value in (("kl_target", target), ("kl_horizon", horizon)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be a finite number above 0")
        self._coef, self.target, self.horizon = float(coef), float(target), float(horizon)

    @property
    def coef(self) -> float:
        """Beta for the next batch."""
        return self._coef

    def update(self, kl: float, batch_size: int) -> None:
        """Move beta by a batch's mean sequence KL (nats, k1) over ``batch_size`` episodes."""
        assert math.isfinite(kl), f"the batch's KL is {kl}"
        error = min(max(kl / self.target - 1.0, -self.MAX_ERROR), self.MAX_ERROR)
        self._coef *= 1.0 + error * batch_size / self.horizon

    def state_dict(self) -> dict[str, float]:
        """Return beta."""
        return {"coef": self._coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from a saved beta; raises ValueError when it is negative or not finite."""
        _check_coef(state["coef"])
        self._coef = float(state["coef"])
