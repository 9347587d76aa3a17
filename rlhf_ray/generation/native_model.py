"""A GPT-2 in the layout of the native pass, and its cache.

Each projection's weight is cut into panels of a few columns that lie together, once per weight update; the pass then
reads it front to back.  bfloat16 weights and cache are widened in registers: half the traffic, float32 arithmetic, also
on processors without bfloat16 instructions.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.models.gpt2 import GPT2, Block
from rlhf_ray.models.kv_cache import COLUMN_BLOCK, round_up
from rlhf_ray.native import build_problem, library
from rlhf_ray.native.training import LANES

PASS_TOKENS = 512
"""Tokens of one pass, which bounds its memory."""


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("ln_1_weight", "ln_1_bias", "c_attn_weight", "c_attn_bias", "attn_c_proj_weight", "attn_c_proj_bias"),
            *("ln_2_weight", "ln_2_bias", "c_fc_weight", "c_fc_bias", "mlp_c_proj_weight", "mlp_c_proj_bias"),
        )
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_layer", "n_embd", "n_head", "vocab_size")),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("wte", "wpe", "ln_f_weight", "ln_f_bias", "head", "layers")),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("rows", "capacity")),
    ]


def native_problem(model: GPT2) -> str:
    """Why the native pass can't run this model here; empty when it can."""
    weight, config = model.wte.weight, model.config
    if weight.device.type != "cpu":
        return f"the model is on {weight.device}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the weights are {weight.dtype}"
    if (config.n_embd // config.n_head) % LANES:
        return f"the head dimension {config.n_embd // config.n_head} is no multiple of {LANES}"
    return build_problem()


class NativeModel:
    """The packed weights, a cache of rows, and calls into the library."""

    def __init__(self, model: GPT2) -> None:
        assert not native_problem(model), native_problem(model)
        self.model = model
        self.library = library()
        self.dtype = model.wte.weight.dtype
        self._panel = self.library.panel_width()
        self._packed: dict[str, Tensor] = {}
        self._stamp: list[tuple[int, int]] = []
        self.rows = self.capacity = 0
        suffix = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[self.dtype]
        self._forward: Callable[..., Any] = self.library[f"forward_{suffix}"]
        self._logits: Callable[..., Any] = self.library[f"logits_{suffix}"]
        self._work = torch.empty(0)

    # -- weights ------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Pack the weights again if one has changed since."""
        stamp = [(p.data_ptr(), p._version) for p in self.model.parameters()]
        if stamp == self._stamp:
            return
        self._stamp = stamp
        config = self.model.config
        layers = (_Layer * config.n_layer)()
        for number, (layer, block) in enumerate(zip(layers, self.model.h, strict=True)):
            assert isinstance(block, Block)
            for name in ("ln_1", "ln_2"):
                norm = getattr(block, name)
                setattr(layer, f"{name}_weight", self._vector(f"{number}.{name}.weight", norm.weight))
                setattr(layer, f"{name}_bias", self._vector(f"{number}.{name}.bias", norm.bias))
            projections = {
                "c_attn": block.attn.c_attn,
                "attn_c_proj": block.attn.c_proj,
                "c_fc": block.mlp.c_fc,
                "mlp_c_proj": block.mlp.c_proj,
            }
            for name, linear in projections.items():  # whose weight an adapter may be merged into at this look
                setattr(layer, f"{name}_weight", self._panels(f"{number}.{name}.weight", linear.weight))
                setattr(layer, f"{name}_bias", self._vector(f"{number}.{name}.bias", linear.bias))
        self._layers = layers  # kept, as the model below has its address alone
        self._struct = _Model(
            n_layer=config.n_layer,
            n_embd=config.n_embd,
            n_head=config.n_head,
            vocab_size=config.vocab_size,
            epsilon=config.layer_norm_epsilon,
            wte=self.model.wte.weight.data_ptr(),
            wpe=self.model.wpe.weight.data_ptr(),
            ln_f_weight=self._vector("ln_f.weight", self.model.ln_f.weight),
            ln_f_bias=self._vector("ln_f.bias", self.model.ln_f.bias),
            head=self._panels("head", self.model.wte.weight),
            layers=ctypes.addressof(layers),
        )

    def _keep(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for what is made of a tensor, the same at every refresh."""
        if name not in self._packed:
            self._packed[name] = _zeros(*shape, dtype=dtype)
        return self._packed[name]

    def _vector(self, name: str, parameter: Tensor) -> int:
        """Address of a vector as float32, padded to whole panels."""
        kept = self._keep(name, (round_up(len(parameter), self._panel),), torch.float32)
        kept[: len(parameter)].copy_(parameter.detach())
        return kept.data_ptr()

    def _panels(self, name: str, parameter: Tensor) -> int:
        """Address of a weight (N, K) as (N / panel, K, panel), zeros behind the last column."""
        N, K = parameter.shape
        kept = self._keep(name, (round_up(N, self._panel) // self._panel, K, self._panel), self.dtype)
        whole = N // self._panel
        columns = parameter.detach().T  # (K, N)
        kept[:whole].copy_(columns[:, : whole * self._panel].view(K, whole, self._panel).transpose(0, 1))
        if N % self._panel:
            kept[whole, :, : N % self._panel].copy_(columns[:, whole * self._panel :])
        return kept.data_ptr()

    # -- cache --------------------------------------------------------------------------------------------------------

    def reserve(self, rows: int, capacity: int) -> None:
        """Make room for ``rows`` rows of ``capacity`` tokens, in the memory at hand when that suffices."""
        capacity = round_up(capacity, COLUMN_BLOCK)
        if rows <= self.rows and capacity <= self.capacity:
            return
        self.rows, self.capacity = max(rows, self.rows), max(capacity, self.capacity)
        config = self.model.config
        head_dim = config.n_embd // config.n_head
        outer = (config.n_layer, self.rows, config.n_head)
        self.keys = self.values = torch.empty(0)  # freed before their successors are allocated
        self.keys = _zeros(*outer, self.capacity // LANES, head_dim, LANES, dtype=self.dtype)
        self.values = _zeros(*outer, self.capacity, head_dim, dtype=self.dtype)
        self._cache = _Cache(
            keys=self.keys.data_ptr(), values=self.values.data_ptr(), rows=self.rows, capacity=self.capacity
        )

    def release(self) -> None:
        """Free the cache and what is made of the weights; ``refresh`` and ``reserve`` make them again."""
        self.keys = self.values = self._work = torch.empty(0)
        self.rows = self.capacity = 0
        self._packed.clear()
        self._stamp = []

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Give row ``target`` the first ``length`` tokens of row ``source``."""
        blocks = round_up(length, LANES) // LANES
        self.keys[:, target, :, :blocks] = self.keys[:, source, :, :blocks]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]

    # -- computation --------------------------------------------------------------------------------------------------

    def forward(self, tokens: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Hidden states (M, D) float32 of tokens (M,) at ``positions`` (M,) of cache ``rows`` (M,), int64 all.

        A row's tokens are given in order, and every position before them is in the cache.
        """
        return self._pass(tokens, rows, positions, only_store=False)

    def store(self, tokens: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> None:
        """Put tokens into the cache as ``forward`` does, and compute no more than that takes."""
        self._pass(tokens, rows, positions, only_store=True)

    def _pass(self, tokens: np.ndarray, rows: np.ndarray, positions: np.ndarray, *, only_store: bool) -> np.ndarray:
        M, D = len(tokens), self.model.config.n_embd
        hidden = np.empty((M, D), dtype=np.float32)
        at_once = min(M, PASS_TOKENS)
        if self._work.numel() < 5 * at_once * D:
            self._work = torch.empty(5 * at_once * D)
        for start in range(0, M, PASS_TOKENS):
            part = slice(start, start + PASS_TOKENS)
            self._forward(
                ctypes.byref(self._struct),
                ctypes.byref(self._cache),
                ctypes.c_int64(len(tokens[part])),
                *(_address(x[part]) for x in (tokens, rows, positions)),
                ctypes.c_void_p(self._work.data_ptr()),
                _address(hidden[part]),
                int(only_store),
                torch.get_num_threads(),
            )
        return hidden

    def logits(self, hidden: np.ndarray, out: Tensor) -> Tensor:
        """Float32 logits (M, V) of hidden states (M, D), in the first rows of ``out``."""
        M = len(hidden)
        self._logits(
            ctypes.byref(self._struct),
            _address(hidden),
            ctypes.c_int64(M),
            ctypes.c_void_p(out.data_ptr()),
            torch.get_num_threads(),
        )
        return out[:M]

    def draw(
        self, logits: Tensor, uniforms: np.ndarray, banned: np.ndarray, temperature: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens (M,) int64, logprobs and log_kept (M,) float32, as ``sampling.sample`` draws them.

        logits (M, V) float32, uniforms (M,) float64, ``banned`` (M,) int64: a token not to draw, -1 for none.
        """
        M, V = logits.shape
        tokens = np.empty(M, dtype=np.int64)
        logprobs, log_kept = np.empty((2, M), dtype=np.float32)
        self.library.draw(
            ctypes.c_void_p(logits.data_ptr()),
            ctypes.c_int64(M),
            ctypes.c_int64(V),
            ctypes.c_double(temperature),
            *(_address(x) for x in (uniforms, banned, tokens, logprobs, log_kept)),
            torch.get_num_threads(),
        )
        return tokens, logprobs, log_kept


def _zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros in numpy's memory, which asks Linux for huge pages."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def _address(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)
