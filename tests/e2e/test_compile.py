"""torch.compile is an option that changes rounding alone; its compiler makes this slow, so it stands apart."""

from __future__ import annotations

import pytest
import torch

from rlhf_ray.models import GPT2, GPT2Config
from rlhf_ray.models.gpt2 import compile_blocks
from rlhf_ray.models.layout import Layout


def test_compiled_blocks_give_the_same_states_and_gradients() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    plain, compiled = GPT2(config), GPT2(config)
    compiled.load_state_dict(plain.state_dict())
    compile_blocks(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for lengths in ([7, 3, 5], [20, 11]):  # of any shape
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        tokens = torch.randint(50, mask.shape)
        found = []
        for model in (plain, compiled):
            states = model.states(tokens, Layout.of(mask))
            model.zero_grad()
            states.square().sum().backward()
            found.append((states.detach(), [p.grad for p in model.parameters()]))
        torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
        assert found[0][0].abs().sum() == pytest.approx(float(found[1][0].abs().sum()), rel=1e-5)
