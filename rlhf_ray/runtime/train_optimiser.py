"""AdamW as every stage uses it: decay on matrices alone, a schedule by step, clipping.

Left out on purpose: optimisers that need more state than the paper's two moments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlhf_ray.config import Optimiser
from rlhf_ray.ops.schedules import SCHEDULES
from rlhf_ray.workers.optimiser import adamw


def make_optimiser(
    model: nn.Module, config: Optimiser, *, bits: int = 32, offload: bool = False
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) over the model's trainable parameters.

    Biases, norms and positions are not decayed: only tensors of two dimensions that are no table of
    positions.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and not name.endswith("wpe.weight")
            (decayed if is_matrix else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return adamw(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        bits=bits,
        offload=offload,
    )


def learning_rate(config: Optimiser, *, step: int, total: int) -> float:
    """The rate of a step, counted from 1."""
    return config.lr * SCHEDULES[config.schedule](step - 1, total, config.warmup_fraction)


def apply_gradients(optimiser: torch.optim.Optimizer, loss: Tensor, *, lr: float, max_grad_norm: float) -> Tensor:
    """Clip (0: don't), step and clear; returns the gradient's norm before clipping, a scalar tensor.

    Where the loss (a scalar) or the norm is not finite there is no step: neither weights nor moments change.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
    for group in optimiser.param_groups:
        group["lr"] = lr
    if bool(loss.isfinite() & norm.isfinite()):  # equal on all ranks, whose sums these are
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm
