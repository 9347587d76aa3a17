"""The weights under a run's adapters, once for all of its processes: a file that they map, or memory of one card.

What a folder's weights become (transposed, packed) is written once, tensor after tensor, and kept for the next run.
Every process of the machine maps that file, so that its pages are in memory once; they are clean, and the system may
drop and read them again.  Nobody writes to them: a mapping is private, so that an accident would stay where it happens.
On a card the same bytes are one piece of memory, which one process lends to the others there.

The model is made of views of these bytes, so that wherever they are it computes the same.

Left out on purpose: who lends (``workers/lending.py``); weights that learn; models of which a run has one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rlhf_ray import console
from rlhf_ray.models import hf_weights, quantised
from rlhf_ray.models.adapter_folders import Base
from rlhf_ray.models.blank import blank
from rlhf_ray.models.gpt2 import GPT2
from rlhf_ray.models.hf_weights import load_policy, policy_state, read_config
from rlhf_ray.models.quantised import Packed, freeze_blank, packed_kind
from rlhf_ray.native.build import cache_folder
from rlhf_ray.rundir.entries import Entries

WEIGHTS = "weights.bin"
ALIGNMENT = 256
"""Bytes of which every tensor's place is a multiple: what CUDA's allocator gives."""
KEEP = 3
"""Newest files to keep."""

_opened: WeakValueDictionary[tuple[str, str], GPT2] = WeakValueDictionary()
"""By name and device: in one process the base is one model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenBase:
    """A policy that does not learn, as several workers need it."""

    base: Base
    shared: bool = True
    """Whether processes share its memory where they can; else each has a copy of its own."""
    borrow: Callable[[torch.device], Tensor | None] | None = None
    """Gives the memory of a card in which another process holds it, or None."""

    def open(self, device: torch.device | str = "cpu") -> GPT2:
        """The model, frozen, on a device; its values must not be written to."""
        folder, kind, where = self.base.folder, self.base.frozen, (self.name, str(device))
        model = _opened.get(where) if self.shared else None
        if model is None:
            memory = self._memory(torch.device(device)) if self.shared else None
            model = load_policy(folder, device=device, frozen=kind) if memory is None else self._of(memory)
            model.eval().requires_grad_(False)
        if self.shared:
            _opened[where] = model
        return model

    @property
    def name(self) -> str:
        """A digest of all that the bytes follow from, our own sources among it."""
        made_by = [Path(module.__file__ or "").read_bytes() for module in (hf_weights, quantised)]
        made_by.append(Path(__file__).read_bytes())
        parts = [self.base.sha256.encode(), self.base.frozen.encode(), *made_by]
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]

    def file(self, *, read_through: bool = False) -> Path:
        """The file, made where there is none, checked if it is to be ``read_through``; OSError where none can be."""
        entries = Entries(cache_folder() / "bases", keep=KEEP, note=console.say, again="it is made anew")
        found = entries.find(self.name, read_through=read_through)
        return (found or entries.make(self.name, self._write)) / WEIGHTS

    def blank(self) -> GPT2:
        """The model, its values yet to come."""
        model = blank(read_config(self.base.folder), torch.float32)
        if self.base.frozen != "float32":
            freeze_blank(model, self.base.frozen)
        return model

    def _memory(self, device: torch.device) -> Tensor | None:
        """(bytes,) uint8 on the device: borrowed, else mapped from the file or copied from there; None without one."""
        if self.borrow and (lent := self.borrow(device)) is not None:
            return lent
        if self.borrow and device.type != "cpu":
            console.say(f"{self.base.folder}: a copy of its own on {device}, as the learner's is not in reach")
        try:
            path = self.file()
            mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:  # torch's own, where a file can't be mapped
            console.say(f"{self.base.folder}: no file that processes could share, so this one has a copy: {error}")
            return None
        return mapped.to(device)

    def _of(self, memory: Tensor) -> GPT2:
        """The model as views of its bytes."""
        model = self.blank()
        places, size = _places(model)
        assert memory.shape == (size,), f"the base has {size} bytes, not {tuple(memory.shape)}"
        state = {
            name: memory[start : start + like.nbytes].view(like.dtype).view(like.shape)
            for name, (start, like) in places.items()
        }
        model.load_state_dict(state, assign=True)
        return model

    def _write(self, folder: Path) -> None:
        """Put the bytes into a folder's file."""
        places, size = _places(self.blank())
        with (folder / WEIGHTS).open("wb") as file:
            for name, value in _values(places, policy_state(self.base.folder), self.base.frozen):
                _pad(file, places[name][0])
                file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
            _pad(file, size)


def memory_of(model: GPT2) -> Tensor | None:
    """(bytes,) uint8: all of an opened model's memory, where it is; None where that is more than one piece."""
    storage = model.wpe.weight.untyped_storage()
    if any(x.untyped_storage().data_ptr() != storage.data_ptr() for x in model.state_dict().values()):
        return None
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _places(model: GPT2) -> tuple[dict[str, tuple[int, Tensor]], int]:
    """Where each tensor of a model begins, by name, with one like it; and the bytes of all."""
    places: dict[str, tuple[int, Tensor]] = {}
    end = 0
    for name, like in model.state_dict().items():
        places[name] = end, like
        end = -(-(end + like.nbytes) // ALIGNMENT) * ALIGNMENT
    return places, end


def _values(names: Mapping[str, object], state: Mapping[str, Tensor], kind: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model that is frozen as ``kind``, one after the other, from those of its folder."""
    packed: Packed | None = None
    for name in names:
        owner, _, part = name.rpartition(".")
        if part == "codes":
            packed = Packed.of(state[f"{owner}.weight"], packed_kind(owner, kind))
            yield name, packed.codes
        elif part == "scales":  # which follow their codes
            assert packed is not None
            yield name, packed.scales
        else:
            yield name, state[name].float()


def _pad(file: BinaryIO, end: int) -> None:
    """Fill a file with zeros up to a place."""
    file.write(bytes(end - file.tell()))
