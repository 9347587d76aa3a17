"""Nested state (optimisers, generators, counters) as a safetensors and a JSON file, exact and without pickle.

Lists, strings, booleans, None, integers and finite floats are themselves in the JSON; the rest is an object
with one tag: ``{"dict": [[key, value], ...]}`` (so integer keys survive), ``{"tuple": [...]}``, ``{"float":
"nan"}`` and ``{"tensor": name, "dtype": ..., "shape": ...}``, whose data is under that name in the
safetensors file.

Left out on purpose: devices (tensors come back on the CPU), aliasing (two names of one tensor come back as
two tensors), requires_grad, and subclasses of the plain types, which come back as the plain type.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_ray.rundir.files import CheckpointError, read_json

FORMAT_VERSION = 1
_NAMES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
)
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES.split()}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SURROGATE = re.compile("[\ud800-\udfff]")


def save_tree(path: str | Path, tree: Any) -> None:
    """Write ``<path>.safetensors`` and ``<path>.json``.

    The tree is made of dict (keys: str, int, float, bool, None), list, tuple, the same scalars, and dense
    tensors. ValueError names the place of anything else.
    """
    tensors: dict[str, Tensor] = {}
    document = {"format_version": FORMAT_VERSION, "tree": _encode(tree, "tree", tensors, set())}
    text = json.dumps(document, allow_nan=False)
    Path(f"{path}.json").write_text(text, encoding="utf-8")
    save_file(tensors, f"{path}.safetensors")


def load_tree(path: str | Path) -> Any:
    """Read what `save_tree` wrote, tensors on the CPU; CheckpointError names the file and the fault."""
    json_path, tensor_path = Path(f"{path}.json"), Path(f"{path}.safetensors")
    if not json_path.exists():
        raise CheckpointError(
            f"{json_path} is missing: the checkpoint was written by another version of this program or for another "
            "configuration; go on with that one, or begin anew (--overwrite, or another --run)"
        )
    document = read_json(json_path)
    if not isinstance(document, dict) or set(document) != {"format_version", "tree"}:
        raise CheckpointError(f"{json_path}: is not a state tree")
    if document["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{json_path}: format version {document['format_version']!r} is unknown; "
            f"this program reads {FORMAT_VERSION}"
        )
    try:
        mapped = load_file(tensor_path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{tensor_path}: cannot be read: {error}") from error
    # load_file maps the file; a copy is independent of what later happens to it.
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}
    try:
        tree = _decode(document["tree"], tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{json_path}: is not a state tree: {error!r}") from error
    if tensors:
        raise CheckpointError(f"{tensor_path}: holds tensors that {json_path.name} does not name: {sorted(tensors)}")
    return tree


def _encode(value: Any, where: str, tensors: dict[str, Tensor], storages: set[int]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise ValueError(f"{where} is {value!r}: half a character can't be saved")
        return str(value)
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{where}[{i}]", tensors, storages) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        for key in value:
            if not (key is None or isinstance(key, (str, int, float))):
                raise ValueError(f"{where} has the key {key!r}; keys are str, int, float, bool or None")
        pairs = [
            [_encode(k, where, tensors, storages), _encode(v, f"{where}[{k!r}]", tensors, storages)]
            for k, v in value.items()
        ]
        return {"dict": pairs}
    if isinstance(value, Tensor):
        return _encode_tensor(value, where, tensors, storages)
    raise ValueError(
        f"{where} is a {type(value).__name__}, which can't be saved; "
        "allowed are dict, list, tuple, str, int, float, bool, None and Tensor"
    )


def _encode_tensor(value: Tensor, where: str, tensors: dict[str, Tensor], storages: set[int]) -> dict[str, Any]:
    dense = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_meta
    if not dense or value.dtype not in _DTYPE_NAMES:
        kind = f"{type(value).__name__} ({value.layout}, {value.dtype}, {value.device})"
        raise ValueError(f"{where} is a {kind}, which can't be saved; make it a plain dense tensor of reals first")
    tensor = value.detach().cpu().resolve_neg().contiguous()
    pointer = tensor.untyped_storage().data_ptr()
    if pointer in storages and tensor.numel():  # the file format has no aliases
        tensor = tensor.clone()
    storages.add(tensor.untyped_storage().data_ptr())
    name = str(len(tensors))
    tensors[name] = tensor
    return {"tensor": name, "dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `_encode`; every tensor is taken out of ``tensors``, so that a leftover or a second use shows."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"tensor", "dtype", "shape"}:
        tensor = tensors.pop(value["tensor"])
        if tensor.dtype != _DTYPES[value["dtype"]] or list(tensor.shape) != value["shape"]:
            raise ValueError(f"tensor {value['tensor']} is {tensor.dtype} {tuple(tensor.shape)}, not {value}")
        return tensor
    ((tag, content),) = value.items()
    if tag == "float":
        return float(content)
    if tag == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if tag == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    raise ValueError(f"unknown tag {tag!r}")
