"""A decode step is one fixed list of operations, and takes new weights where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_models import EOS, PAD, SAMPLINGS, eager_for_eos, make_step, random_model, random_prompts, uniforms
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_ray.generation.sampling import Sampling
from rlhf_ray.generation.slots import doubled
from rlhf_ray.generation.torch_engine import TorchEngine
from rlhf_ray.models import GPT2
from rlhf_ray.models.kv_cache import round_up


class Operations(TorchDispatchMode):
    """Notes every operation with the shapes of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.noted.append((str(func), [leaf.shape for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]))
        return out


@pytest.mark.parametrize("sampling", SAMPLINGS)
@torch.no_grad()
def test_a_step_asks_for_no_value_and_no_shape_depends_on_one(sampling: Sampling) -> None:
    step = make_step(random_model().double(), sampling)  # which passes through torch alone, as on a GPU
    # Tensors without data: reading a value, or a shape that depends on one, raises.
    with FakeTensorMode(allow_non_fake_inputs=True), Operations() as operations:
        step.run(16, 48)
    assert len(operations.noted) > 50


@pytest.mark.parametrize("sampling", SAMPLINGS)
@torch.inference_mode()
def test_what_a_step_does_follows_from_rows_and_reach_alone(sampling: Sampling) -> None:
    step = make_step(random_model().double(), sampling)
    step.record.begin(uniforms(list(range(32)), 20))
    busy, prompts = np.arange(12), np.arange(20, 32)
    step.slots.start(busy, prompts, lengths=np.arange(12), last=np.arange(12))
    state = (step.slots.last, step.slots.index, step.slots.done, step.slots.cache.keys, step.record.tokens)
    addresses = [tensor.data_ptr() for tensor in state]
    lists = []
    for _ in range(20):
        with Operations() as operations:
            step.run(16, 48)
        lists.append(operations.noted)
    assert all(noted == lists[0] for noted in lists)  # while rows grow and end
    assert [tensor.data_ptr() for tensor in state] == addresses
    assert step.slots.cache.lengths.tolist() == [*range(20, 32), *[0] * 20]
    assert step.slots.index.tolist() == [*(20 * prompts + 20), *[step.record.spare] * 20]
    assert (step.record.tokens.view(-1, 20)[20:32, :20] != 0).any(1).all()


def test_shared_weights_are_updated_in_place_and_memory_is_kept() -> None:
    model, updated = eager_for_eos(2.0).double(), random_model().double()  # float64 is not reordered, as on a GPU
    prompts, sampling = random_prompts(40, 20), Sampling(max_new_tokens=20)
    u = uniforms(list(range(40)), 20)

    def fresh(model: GPT2) -> TorchEngine:
        return TorchEngine(model, eos_id=EOS, pad_id=PAD, max_rows=16)

    engine = fresh(model)
    first = engine.generate(prompts, u, sampling)
    with torch.no_grad():
        for old, new in zip(model.parameters(), updated.parameters(), strict=True):
            old.copy_(new)
    second = engine.generate(prompts, u, sampling)
    assert second == fresh(updated).generate(prompts, u, sampling) != first
    few = Sampling(max_new_tokens=3, min_new_tokens=2)  # another way to draw, in the same memory
    assert engine.generate(prompts[:5], u[:5], few) == fresh(updated).generate(prompts[:5], u[:5], few)
    assert engine.generate(prompts, u, sampling) == second


@pytest.mark.parametrize(("whole", "expected"), [(round_up, [16, 16, 32, 48, 112]), (doubled, [16, 16, 32, 64, 128])])
def test_sizes_are_whole_blocks(whole: Callable[[int, int], int], expected: list[int]) -> None:
    assert [whole(n, 16) for n in (1, 16, 17, 33, 100)] == expected
