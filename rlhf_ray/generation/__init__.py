"""Generation engines; a new one is one file and one line in ENGINES."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_ray.generation.native_engine import NativeEngine
from rlhf_ray.generation.native_model import native_problem
from rlhf_ray.generation.requests import Completion, Engine, TextOf
from rlhf_ray.generation.sampling import Sampling, row_uniforms, sample
from rlhf_ray.generation.torch_engine import TorchEngine
from rlhf_ray.models.gpt2 import GPT2

ENGINES: dict[str, Callable[..., Engine]] = {"native": NativeEngine, "torch": TorchEngine}


def make_engine(
    model: GPT2, *, eos_id: int, pad_id: int, max_rows: int = 64, text: TextOf | None = None, kind: str = "auto"
) -> Engine:
    """An engine for a model; ``auto`` takes the native one where it can run, else torch.

    ``text`` gives the bytes of tokens, for stop strings.  ValueError when ``native`` is asked for and can't run.
    """
    problem = native_problem(model) if kind in ("auto", "native") else ""
    if kind == "native" and problem:
        raise ValueError(f"engine = native: {problem}; take auto or torch")
    if kind == "auto":
        kind = "torch" if problem else "native"
    return ENGINES[kind](model, eos_id=eos_id, pad_id=pad_id, max_rows=max_rows, text=text)


__all__ = ["ENGINES", "Completion", "Engine", "Sampling", "make_engine", "native_problem", "row_uniforms", "sample"]
