"""GPT-2 (Radford et al. 2019): pre-norm blocks, tanh GELU, learned positions, tied embedding.

Every forward pass, padded, packed or cached, goes through one call of ``scaled_dot_product_attention``.
Parameters carry GPT-2's own names; projections are ``nn.Linear``, so a Hugging Face folder stores them
transposed.

Left out on purpose: cross attention, attention scaled by layer, and a language-model head of its own (the
embedding is the head).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_ray.models.kv_cache import CacheStep, KVCache
from rlhf_ray.ops.logprobs import head_logits

INIT_STD = 0.02

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

    def forward(self, x: Tensor, mask: Tensor | None, step: CacheStep | None, layer: int) -> Tensor:
        """Attend x (B, T, D) to itself, or to the cached columns; no mask means plain causality."""
        B, T, D = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head)  # (B, T, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D/H) each
        if step is not None:
            k, v = step.store(layer, k, v)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=self.dropout if self.training else 0.0
        )
        return F.dropout(self.c_proj(out.transpose(1, 2).reshape(B, T, D)), self.dropout, self.training)


class MLP(nn.Module):
    """Two projections around a tanh GELU, four times as wide as the residual stream."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.act: nn.Module = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return F.dropout(self.c_proj(self.act(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream after a layer norm of its own."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, step: CacheStep | None, layer: int) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attn(self.ln_1(x), mask, step, layer)
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
        """Hidden states (B, T, D) of tokens (B, T); finite but meaningless where the mask leaves one out.

        ``attention_mask`` (B, T), nonzero on real tokens, may be padded on either side; right-padded rows
        need none, because a token never sees what comes after it.  ``document_ids`` (B, T) marks packed
        documents, contiguous runs of one id: attention stays inside a run and positions start again.  With a
        ``cache`` the tokens continue its rows, which grow by their real tokens.

        Raises ValueError when a row is longer than ``n_positions`` or than the cache.
        """
        assert cache is None or document_ids is None, "packed documents are not generated from"
        order = None
        if attention_mask is not None and tokens.shape[1] > 1:
            # Causal attention can't see padding that comes last, so it is moved there from either side.
            order = torch.argsort((attention_mask == 0).to(torch.int8), dim=1, stable=True)  # (B, T)
            tokens = tokens.gather(1, order)
            document_ids = None if document_ids is None else document_ids.gather(1, order)
        step = None if cache is None else cache.begin(tokens.shape[1])
        hidden = self._blocks(tokens, document_ids, step)
        if cache is not None:
            cache.advance(tokens.shape[1], attention_mask)
        if order is None:
            return hidden
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        return hidden[rows, order.argsort(1)]

    def _blocks(self, tokens: Tensor, document_ids: Tensor | None, step: CacheStep | None) -> Tensor:
        T, device = tokens.shape[1], tokens.device
        longest = T if step is None else step.longest
        if longest > self.config.n_positions:
            raise ValueError(f"row length {longest} exceeds n_positions {self.config.n_positions}: shorten the row")
        mask: Tensor | None = None
        positions = torch.arange(T, device=device)  # (T,)
        if step is not None:
            positions, mask = step.positions, step.mask
        elif document_ids is not None:
            positions, mask = _document_layout(document_ids)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, D)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            if self.checkpointing and torch.is_grad_enabled() and step is None:
                x = checkpoint(block, x, mask, step, layer, use_reentrant=False)
            else:
                x = block(x, mask, step, layer)
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (..., V) of hidden states (..., D)."""
        return head_logits(hidden, self.wte.weight)


def _initialise(module: nn.Module, *, residual_std: float) -> None:
    """GPT-2's initialisation: N(0, 0.02), scaled by 1/sqrt(2 n_layer) where a block adds to its input."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, (Attention, MLP)):
        nn.init.normal_(module.c_proj.weight, std=residual_std)


def _document_layout(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (B, T) inside each run of equal ids, and the mask (B, 1, T, T) of causality inside it."""
    T = document_ids.shape[1]
    index = torch.arange(T, device=document_ids.device)
    changed = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)  # (B, T)
    starts = torch.where(changed, index, 0).cummax(1).values  # (B, T): where each token's run began
    same = starts[:, :, None] == starts[:, None, :]  # (B, T, T)
    return index - starts, (same & (index[:, None] >= index))[:, None]
