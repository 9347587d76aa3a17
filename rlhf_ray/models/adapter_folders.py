"""Adapters to and from PEFT's folders, and what a checkpoint says of the weights below them.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` with PEFT's names for a GPT-2, A (rank, in) and
B (out, rank) in float32, so that reading one back is exact; a reward model's has the weight of its score too.  PEFT
opens such a folder over the base that it names, and one that PEFT wrote opens here.

Left out on purpose: PEFT's variants (DoRA, ranks by layer, trained biases and embeddings), which are refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_ray.config.lora import LoRA
from rlhf_ray.models.gpt2 import GPT2
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.hf_weights import PREFIX, read_normaliser
from rlhf_ray.models.lora import LAYERS, adapted_layers, with_adapters
from rlhf_ray.rundir.files import CheckpointError, read_json
from rlhf_ray.rundir.fit import tensor_faults

ADAPTER = "adapter"
"""The PEFT folder inside a checkpoint, whose own model is merged."""
CONFIG, WEIGHTS, BASES = "adapter_config.json", "adapter_model.safetensors", "bases.json"
OUTER = "base_model.model."
# What PEFT's LoraConfig allows beside plain adapters, and the values that mean their absence.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A model under an adapter: where it is, the SHA-256 of its files, and how its weights are kept."""

    folder: Path
    sha256: str
    frozen: str = "float32"

    @classmethod
    def of(cls, folder: Path, *, frozen: str = "float32") -> Base:
        """Read a model folder's configuration, which a reward model's normaliser is in, and its weights through."""
        total = hashlib.sha256()
        for path in [folder / "config.json", *sorted(folder.glob("model*.safetensors"))]:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return cls(folder=folder, sha256=total.hexdigest(), frozen=frozen)

    def is_under(self, folder: Path) -> bool:
        """Whether what a folder holds can be opened as adapters over this model: they were trained over these weights,
        whole or kept in the same way.
        """
        if not ((folder / BASES).is_file() and (folder / ADAPTER / WEIGHTS).is_file()):
            return False
        known = read_json(folder / BASES).get("policy", {})
        return known.get("sha256") == self.sha256 and known.get("frozen", "float32") in ("float32", self.frozen)


def base_folder(folder: Path) -> Path | None:
    """Where the policy was that a folder's adapters were trained over; None of one without."""
    if not (folder / BASES).is_file():
        return None
    return Path(read_json(folder / BASES).get("policy", {}).get("folder", ""))


def save_adapter(model: GPT2 | ValueModel, folder: Path, lora: LoRA, base: Base) -> None:
    """Write a model's adapters, and a reward model's score, as a PEFT folder."""
    score = isinstance(model, ValueModel)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if score else "CAUSAL_LM",
        "base_model_name_or_path": str(base.folder),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": True,  # GPT-2's Conv1D keeps (in, out)
        "target_modules": [".".join(LAYERS[target]) for target in LAYERS if target in lora.targets],
        "modules_to_save": ["score"] if score else None,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.detach().cpu().contiguous() for name, x in _tensors(model).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def load_adapter(model: GPT2 | ValueModel, folder: Path) -> None:
    """Give a model with adapters those of a PEFT folder; ValueError, naming what is wrong, when they don't fit it."""
    lora, state = read_lora(folder), _read(folder)
    own = _tensors(model)
    scales = {layer.scale for _, layer in adapted_layers(model)}
    faults = tensor_faults(state, own)
    if scales != {lora.alpha / lora.rank}:
        faults.insert(0, f"alpha / rank is {lora.alpha / lora.rank:g}, expected {', '.join(map(str, sorted(scales)))}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{folder}: the adapter does not fit this model: {'; '.join(faults[:3])}{more}")
    for name, parameter in own.items():
        parameter.copy_(state[name])


def reward_model_over(policy: GPT2, folder: Path) -> ValueModel:
    """The reward model of a folder as its adapters over the policy's own weights, which `Base.is_under` allows; its
    trunk is frozen.
    """
    model = ValueModel(with_adapters(policy, read_lora(folder / ADAPTER), seed=0))
    load_adapter(model, folder / ADAPTER)
    read_normaliser(model, folder)
    model.trunk.requires_grad_(False)
    return model


def read_lora(folder: Path) -> LoRA:
    """Rank, alpha and targets of a PEFT folder; ValueError when it is no plain LoRA of a GPT-2."""
    config = read_json(folder / CONFIG)
    for key, allowed in _PLAIN.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{folder / CONFIG}: {key} is {config[key]!r}; only {allowed[0]!r} can be read")
    names = _read(folder)
    targets = [target for target, (owner, name) in LAYERS.items() if any(f".{owner}.{name}.lora_A" in n for n in names)]
    if not targets:
        raise ValueError(f"{folder / WEIGHTS}: no adapter of a layer of GPT-2 is in it")
    return LoRA(rank=config["r"], alpha=config["lora_alpha"], targets=targets)


def save_bases(folder: Path, bases: Mapping[str, Base]) -> None:
    """Write down which weights a checkpoint's adapters belong to."""
    named = {role: {**asdict(base), "folder": str(base.folder)} for role, base in bases.items()}
    (folder / BASES).write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")


def check_bases(folder: Path, bases: Mapping[str, Base]) -> None:
    """CheckpointError unless these are the weights that a checkpoint's adapters belong to, wherever they are now."""
    saved = read_json(folder / BASES)
    for role, base in bases.items():
        known = saved.get(role, {})
        if known.get("sha256") != base.sha256:
            raise CheckpointError(
                f"{folder / BASES}: the {role}'s adapter belongs to the weights that {known.get('folder')} held, and "
                f"{base.folder} holds others; put those back, or begin anew (--overwrite, or another --run)"
            )


def _tensors(model: GPT2 | ValueModel) -> dict[str, Tensor]:
    """What a PEFT folder of the model holds, under PEFT's names."""
    tensors: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model):
        inside = f"{OUTER}{PREFIX}{name.removeprefix('trunk.')}"
        tensors |= {f"{inside}.lora_A.weight": layer.A, f"{inside}.lora_B.weight": layer.B}
    if isinstance(model, ValueModel):
        tensors[f"{OUTER}score.weight"] = model.score.weight
    return tensors


def _read(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{path} is missing: an adapter's folder has {CONFIG} and {WEIGHTS} (no pickle is loaded)")
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
