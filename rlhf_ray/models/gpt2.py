"""GPT-2 (Radford et al. 2019): pre-norm blocks, tanh GELU, learned positions, tied embedding.

``states`` is the forward pass: hidden states of real tokens alone, as (N, D), where a ``Layout`` asks for them.
Generation passes (B, T, D) through the same blocks with a cache.  Either way the layout or the cache attends with what
the blocks hand it.  Parameters carry GPT-2's own names; projections are ``nn.Linear``, so a Hugging Face folder stores
them transposed.

Left out on purpose: cross attention, attention scaled by layer, and a language-model head of its own (the
embedding is the head).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_ray.models.kv_cache import CacheStep, KVCache
from rlhf_ray.models.layout import Layout, take
from rlhf_ray.native import training
from rlhf_ray.ops.logprobs import head_logits

INIT_STD = 0.02

Attend = Callable[[int, Tensor, float], Tensor]
"""(layer, queries, keys and values (..., 3, H, d), dropout) -> (..., H, d)."""

PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 256},
    "mini_xl": {"n_layer": 12, "n_embd": 384, "n_head": 12, "n_positions": 1024},
    "small": {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024},
    "medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16, "n_positions": 1024},
    "large": {"n_layer": 36, "n_embd": 1280, "n_head": 20, "n_positions": 1024},
    "xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25, "n_positions": 1024},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config:
    """The shape of one GPT-2."""

    vocab_size: int
    """Rows of the embedding, special tokens included."""
    n_positions: int
    """Longest row in tokens, prompt and response together."""
    n_embd: int
    """Width of the residual stream."""
    n_layer: int
    """Blocks."""
    n_head: int
    """Attention heads; must divide ``n_embd``."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in every layer norm."""
    dropout: float = 0.0
    """Probability of dropping an embedding, attention weight or residual while training."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head is {self.n_head}; it must divide n_embd, which is {self.n_embd}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")


def preset(name: str, vocab_size: int) -> GPT2Config:
    """The named shape with the given vocabulary; ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; allowed are {', '.join(PRESETS)}")
    return GPT2Config(vocab_size=vocab_size, **PRESETS[name])


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused query-key-value projection."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, attend: Attend, layer: int) -> Tensor:
        """x (..., D) -> what its tokens saw (..., D), yet to be projected."""
        qkv = self.c_attn(x).view(*x.shape[:-1], 3, self.n_head, -1)
        return attend(layer, qkv, self.dropout if self.training else 0.0).flatten(-2)

    def project(self, seen: Tensor) -> Tensor:
        """(..., D) -> what is added to the residual stream (..., D)."""
        return F.dropout(self.c_proj(seen), self.dropout, self.training)


class GELU(nn.Module):
    """The tanh GELU, by the compiled library where that serves."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return training.gelu(x) if training.serves(x) else F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """Two projections around a tanh GELU, four times as wide as the residual stream."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.act: nn.Module = GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.dropout(self.c_proj(self.act(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream after a layer norm of its own."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend: Attend, layer: int, read: Tensor | None = None) -> Tensor:
        """x (..., D) -> (..., D), or the rows ``read`` (n,) of it alone, (n, D)."""
        seen = self.attn(self.ln_1(x), attend, layer)
        if read is not None:
            x, seen = take(x, read), take(seen, read)
        x = x + self.attn.project(seen)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """The trunk: tokens in, hidden states after the final norm out.

    ``checkpointing = True`` recomputes each block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self, config: GPT2Config, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.apply(partial(_initialise, residual_std=INIT_STD / math.sqrt(2 * config.n_layer)))
        self.to(device=device, dtype=dtype)

    def forward(
        self,
        tokens: Tensor,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) of tokens (B, T), where somebody wants all of them; 0 on padding.

        ``attention_mask`` (B, T), nonzero on real tokens, may be padded on either side; right-padded rows
        need none, because a token never sees what comes after it.  ``document_ids`` (B, T) marks packed
        documents, contiguous runs of one id: attention stays inside a run and positions start again; 0 is
        padding.  With a ``cache`` the tokens continue its rows, which grow by their real tokens; padding then
        holds something finite.

        Raises ValueError when a row is longer than ``n_positions`` or than the cache.
        """
        if cache is None:
            documents = _documents(tokens, attention_mask, document_ids)
            layout = Layout.of(documents, device=tokens.device)
            return layout.batch(self.states(tokens, layout))
        assert document_ids is None, "packed documents are not generated from"
        return self._continue(tokens, attention_mask, cache)

    def states(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Hidden states (n, D) of tokens (B, T), wherever the layout asks for them.

        After the last attention only those places are computed.  ValueError when a document is longer than
        ``n_positions``.
        """
        x = self._embed(layout.flat(tokens), layout.positions, layout.longest)  # (N, D)
        last = len(self.h) - 1
        for layer, block in enumerate(self.h):
            arguments = (x, layout.attend, layer, layout.read if layer == last else None)
            if self.checkpointing and torch.is_grad_enabled():
                random = self.training and self.config.dropout > 0  # the same is dropped again
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=random)
            else:
                x = block(*arguments)
        return self.ln_f(x)

    def _continue(self, tokens: Tensor, attention_mask: Tensor | None, cache: KVCache) -> Tensor:
        """Hidden states (B, T, D) of tokens that go on from a cache."""
        order = None
        if attention_mask is not None and tokens.shape[1] > 1:
            # A cache holds rows from column 0, so padding is moved to the right from either side.
            order = torch.argsort((attention_mask == 0).to(torch.int8), dim=1, stable=True)  # (B, T)
            tokens = tokens.gather(1, order)
        step = cache.begin(tokens.shape[1])
        x = self._embed(tokens, step.positions, step.longest)  # (B, T, D)
        for layer, block in enumerate(self.h):
            x = block(x, partial(_attend_to_cache, step), layer)
        x = self.ln_f(x)
        cache.advance(tokens.shape[1], attention_mask)
        if order is None:
            return x
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        return x[rows, order.argsort(1)]

    def _embed(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        if longest > self.config.n_positions:
            raise ValueError(f"row length {longest} exceeds n_positions {self.config.n_positions}: shorten the row")
        return F.dropout(self.wte(tokens) + self.wpe(positions), self.config.dropout, self.training)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (..., V) of hidden states (..., D)."""
        return head_logits(hidden, self.wte.weight)


def checkpoint_blocks(model: nn.Module) -> None:
    """Have every GPT-2 in the model recompute its blocks in the backward pass."""
    for module in model.modules():
        if isinstance(module, GPT2):
            module.checkpointing = True


def compile_blocks(model: nn.Module) -> None:
    """Fuse the elementwise work of every block's MLP and norms with ``torch.compile``, for any number of tokens.

    Parameters, names and copies stay as they are; results change by rounding alone.
    """
    for module in model.modules():
        if isinstance(module, (MLP, nn.LayerNorm)):
            module.compile(dynamic=True)


def _initialise(module: nn.Module, *, residual_std: float) -> None:
    """GPT-2's initialisation: N(0, 0.02), scaled by 1/sqrt(2 n_layer) where a block adds to its input."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, (Attention, MLP)):
        nn.init.normal_(module.c_proj.weight, std=residual_std)


def _attend_to_cache(step: CacheStep, layer: int, qkv: Tensor, dropout: float) -> Tensor:
    """Store keys and values of qkv (B, T, 3, H, d), and attend to all that the rows hold: (B, T, H, d)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, d) each
    k, v = step.store(layer, k, v)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=step.mask, is_causal=step.mask is None, dropout_p=dropout)
    return out.transpose(1, 2)


def _documents(tokens: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
    """Document ids (B, T) of a batch; without a mask every token is real."""
    documents = torch.ones_like(tokens) if document_ids is None else document_ids
    return documents if attention_mask is None else documents * (attention_mask != 0)
