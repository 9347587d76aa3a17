"""Whether saved state fits what is to take it over; what does not is refused by name.

Left out on purpose: dtypes, which torch converts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_ray.rundir.files import CheckpointError


def tensor_faults(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """What keeps saved tensors from taking the place of a model's ``own``: a line for each."""
    faults = [f"{name} is missing" for name in own if name not in state]
    faults += [f"{name} is unknown" for name in state if name not in own]
    return faults + [
        f"{name} is {list(state[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]


def check_module(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """CheckpointError naming the tensors, read from ``path``, that a module lacks, has not or has in another shape."""
    check_tensors(module.state_dict(), state, path)


def check_tensors(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """The same of a part of a module's tensors."""
    _refuse(path, tensor_faults(state, own))


def check_optimiser(optimiser: Optimizer, state: Mapping[str, Any], path: Path) -> None:
    """CheckpointError when the state of an AdamW, read from ``path``, is that of other parameters, or of other bits."""
    bits, own_bits = (groups[0].get("bits", 32) for groups in (state["param_groups"], optimiser.param_groups))
    if bits != own_bits:
        _refuse(path, [f"its moments have {bits} bits, this run's {own_bits}: take memory.optimizer_bits {bits}"])
    own = [[tuple(p.shape) for p in group["params"]] for group in optimiser.param_groups]
    saved = [list(group["params"]) for group in state["param_groups"]]
    if [len(group) for group in saved] != [len(group) for group in own]:
        _refuse(path, [f"it is of {list(map(len, saved))} parameters a group, the model has {list(map(len, own))}"])
    pairs = [pair for numbers, shapes in zip(saved, own, strict=True) for pair in zip(numbers, shapes, strict=True)]
    _refuse(path, [fault for number, shape in pairs for fault in _moment_faults(number, state["state"], shape)])


def _moment_faults(number: int, state: Mapping[int, Mapping[str, Tensor]], shape: tuple[int, ...]) -> list[str]:
    """What is wrong with one parameter's moments, which are there once any step was taken."""
    if not state:
        return []
    if number not in state or not {"step", "exp_avg", "exp_avg_sq"} <= state[number].keys():
        return [f"the moments of parameter {number} are missing"]
    found = tuple(state[number]["exp_avg"].shape), tuple(state[number]["exp_avg_sq"].shape)
    return [] if found == (shape, shape) else [f"the moments of parameter {number} are {found[0]}, not {shape}"]


def _refuse(path: Path, faults: list[str]) -> None:
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{path} does not fit this run's model: {'; '.join(faults[:3])}{more}")
