"""What tests of generation share: models with random weights, prompts, uniforms, and what rows are held to."""

from __future__ import annotations

import numpy as np
import torch

from rlhf_ray.generation import Completion, Sampling, row_uniforms
from rlhf_ray.generation.decode import DecodeStep
from rlhf_ray.generation.record import Record
from rlhf_ray.generation.slots import Slots
from rlhf_ray.models import GPT2, GPT2Config
from rlhf_ray.models.kv_cache import KVCache

CONFIG = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2)
EOS, PAD = 92, 90
SAMPLINGS = [
    Sampling(max_new_tokens=20),
    Sampling(max_new_tokens=20, temperature=0.0),
    Sampling(max_new_tokens=20, min_new_tokens=5, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, stop_ids=(3,)),
]


def random_model(config: GPT2Config = CONFIG, dtype: torch.dtype = torch.float32) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_prompts(count: int, longest: int, vocab_size: int = 97) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, size=rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def uniforms(rows: list[int], length: int) -> np.ndarray:
    return np.stack([row_uniforms(0, 0, row, length) for row in rows])


def eager_for_eos(bias: float, config: GPT2Config = CONFIG) -> GPT2:
    """A model in which EOS is likely everywhere."""
    model = random_model(config)
    with torch.no_grad():
        model.ln_f.bias.copy_(bias * model.wte.weight[EOS])
    return model


def make_step(model: GPT2, sampling: Sampling, rows: int = 32) -> DecodeStep:
    """A step in empty memory of its own."""
    config, weight = model.config, model.wte.weight
    cache = KVCache.empty(
        n_layer=config.n_layer,
        rows=rows,
        n_head=config.n_head,
        capacity=config.n_positions,
        head_dim=config.n_embd // config.n_head,
        device=weight.device,
        dtype=weight.dtype,
    )
    record = Record.empty(rows, sampling, np.array([EOS, *sampling.stop_ids]), weight)
    step = DecodeStep(model=model.eval(), slots=Slots(cache), record=record)
    step.slots.reset(budget=sampling.max_new_tokens, spare=record.spare)
    return step


def check_against_full_forward(
    model: GPT2, prompts: list[list[int]], completions: list[Completion], temperature: float, atol: float = 1e-4
) -> None:
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.tensor([prompt + completion.tokens], device=model.wte.weight.device)
        with torch.no_grad():
            logits = model.logits(model(tokens))[0, len(prompt) - 1 : -1] / temperature
        expected = logits.log_softmax(1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected.cpu(), atol=atol, rtol=0)
