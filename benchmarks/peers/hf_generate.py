"""transformers' generate on a random GPT-2: prints one JSON line with tokens per second, the median of repetitions.

    python benchmarks/peers/hf_generate.py --size mini_xl --dtype float32 --batch 64 --prompt 64 --new 128 --threads 2

Samples from the full softmax and never stops at an EOS.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

SIZES = {
    "tiny": (4, 128, 4, 4103, 256),
    "mini_xl": (12, 384, 12, 50264, 1024),
    "small": (12, 768, 12, 50264, 1024),
}
"""Layers, width, heads, vocabulary and positions."""


def random_model(size: str) -> GPT2LMHeadModel:
    """A model with transformers' own initialisation and without special tokens."""
    layers, width, heads, vocab, positions = SIZES[size]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def generate(model: GPT2LMHeadModel, ids: Tensor, new: int) -> Tensor:
    """Continue prompts (B, T) of equal length by exactly ``new`` tokens: (B, T + new)."""
    out: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        min_new_tokens=None,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )
    if ids.is_cuda:
        torch.cuda.synchronize()
    return out


def load(folder: Path, *, dtype: torch.dtype, device: torch.device) -> GPT2LMHeadModel:
    """The model of a folder, its EOS forgotten so that no row stops."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval().to(device)
    model.generation_config.eos_token_id = None
    return model


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description="transformers' generate")
    parser.add_argument("--size", default="mini_xl", choices=SIZES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    for name, default in {"batch": 32, "prompt": 64, "new": 128, "threads": 2, "repetitions": 3}.items():
        parser.add_argument("--" + name, type=int, default=default)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=found, choices=["cpu", "cuda"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = options.device
    model = random_model(options.size).to(device, getattr(torch, options.dtype))
    ids = torch.randint(0, SIZES[options.size][3], (options.batch, options.prompt), device=device)
    times = []
    for _ in range(options.repetitions + 1):
        start = time.perf_counter()
        out = generate(model, ids, options.new)
        times.append(time.perf_counter() - start)
        assert out.shape == (options.batch, options.prompt + options.new)
    rate = options.batch * options.new / statistics.median(times[1:])
    print(json.dumps({"peer": "transformers", **vars(options), "tokens_per_s": round(rate, 1)}))


if __name__ == "__main__":
    main()
