"""Generation on plain torch: a preallocated cache, ragged prompts, continuous batching.

A prompt is prefilled up to its last token; that token and every drawn one then pass through the same decode
step, so there is one place where tokens are drawn.  Slots whose row has ended are given to waiting prompts;
when none wait, the batch shrinks.  A row's tokens depend on its prompt, its uniforms and the weights alone.

Left out on purpose: CUDA graphs, paging, prefix sharing and speculative decoding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.generation.packed import pack, packable
from rlhf_ray.generation.sampling import Sampling, sample
from rlhf_ray.generation.slots import ROW_BLOCK, Slots
from rlhf_ray.models.gpt2 import GPT2
from rlhf_ray.models.kv_cache import COLUMN_BLOCK, KVCache, round_up

PREFILL_TOKENS = 8192
"""Tokens of one prefill pass, which bounds its memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What was generated for one prompt."""

    tokens: list[int]
    """The response, its EOS included when it has one."""
    logprobs: list[float]
    """Log-probability of each token in the full distribution at the temperature (at 1 when that is 0)."""
    finished: bool
    """The response ended by EOS, not by its length."""


class Engine:
    """Generates with a model whose weights may change between calls; one thread at a time may call it."""

    def __init__(self, model: GPT2, *, eos_id: int, pad_id: int, max_rows: int = 64) -> None:
        """``max_rows`` bounds the rows generated at once, rounded up to whole blocks of 16."""
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; it must be at least 1")
        self.model = model
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.max_rows = max_rows
        on_cpu = model.wte.weight.device.type == "cpu"
        # A look at which rows have ended makes the host wait for a GPU, and a launch costs more there than padding.
        self.burst = 1 if on_cpu else 8
        """Decode steps between two looks at which rows have ended."""
        self.width_block = COLUMN_BLOCK if on_cpu else 128
        """Prefill widths are whole multiples of it."""
        self._runner: GPT2 | None = None
        self._stamp: list[tuple[int, int, int]] = []
        self._cache: KVCache | None = None

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in order, whatever order they end in.

        uniforms (B, >= max_new_tokens) float64 in [0, 1) decide every draw.  ValueError for an empty prompt,
        for one that leaves no room for ``max_new_tokens`` within ``n_positions``, and for too few uniforms.
        """
        self._check(prompts, uniforms, sampling)
        if not prompts:
            return []
        model, device = self._current(), self.model.wte.weight.device
        N, budget = len(prompts), sampling.max_new_tokens
        draws = torch.zeros(N + 1, budget, dtype=torch.float64)  # the spare row serves free slots
        draws[:N] = torch.from_numpy(np.ascontiguousarray(uniforms[:, :budget]))
        draws = draws.view(-1).to(device)
        tokens = torch.zeros_like(draws, dtype=torch.int64)
        logprobs = torch.zeros_like(draws, dtype=torch.float32)
        slots = Slots(self._allocate(N, max(map(len, prompts)) + budget), prompts=N, budget=budget)
        refill_at = max(1, len(slots.prompt) // 8)
        waiting = 0  # first prompt without a slot
        while waiting < N or len(slots.taken):
            if waiting < N and (len(slots.free) >= refill_at or not len(slots.taken)):
                chosen = slots.free[: N - waiting]
                self._prefill(model, slots, chosen, prompts, waiting)
                waiting += len(chosen)
            elif waiting == N:
                slots.compact()
            steps = min(self.burst, int(slots.left[slots.taken].min()))
            self._decode(model, slots, steps, draws, tokens, logprobs, sampling)
            slots.stepped(steps)
        return self._collect(tokens[:-budget].view(N, budget), logprobs[:-budget].view(N, budget))

    @torch.inference_mode()
    def stream(self, prompt: Sequence[int], uniforms: np.ndarray, sampling: Sampling) -> Iterator[int]:
        """The tokens of one completion as they are drawn, its EOS included; uniforms (>= max_new_tokens,).

        A row alone is not padded to a block: its logits may differ from ``generate``'s in the last bits.
        ValueError as for ``generate``.
        """
        self._check([prompt], uniforms[None], sampling)
        model, device = self._current(), self.model.wte.weight.device
        cache = self._new_cache(1, len(prompt) + sampling.max_new_tokens)
        tokens = torch.tensor([prompt], dtype=torch.int64, device=device)
        if len(prompt) > 1:
            model(tokens[:, :-1], cache=cache)
        last = tokens[:, -1]  # (1,)
        draws = torch.from_numpy(np.ascontiguousarray(uniforms)).to(device)
        for t in range(sampling.max_new_tokens):
            logits = model.logits(model(last[:, None], cache=cache)[:, 0])  # (1, V)
            young = torch.tensor([t + 1 < sampling.min_new_tokens], device=device)
            last, _ = sample(logits, draws[t : t + 1], sampling, banned=self._ban(logits, young, sampling))
            token = int(last)
            yield token
            if token == self.eos_id:
                return

    def _check(self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling) -> None:
        n_positions = self.model.config.n_positions
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {row} is empty: it needs at least one token to continue from")
            if len(prompt) + sampling.max_new_tokens > n_positions:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens and max_new_tokens is {sampling.max_new_tokens}: "
                    f"together they exceed n_positions {n_positions}; shorten either"
                )
        if len(uniforms) != len(prompts) or (len(prompts) and uniforms.shape[1] < sampling.max_new_tokens):
            raise ValueError(
                f"uniforms are {uniforms.shape}; {len(prompts)} prompts and max_new_tokens "
                f"{sampling.max_new_tokens} need ({len(prompts)}, {sampling.max_new_tokens})"
            )

    def _current(self) -> GPT2:
        """The model in the form that runs fastest here, made anew when a weight has changed since."""
        stamp = [(id(p), p.data_ptr(), p._version) for p in self.model.parameters()]
        if self._runner is None or stamp != self._stamp:
            shared = {id(p): p for p in self.model.parameters()}
            same = not packable(self.model)
            self._runner = copy.deepcopy(self.model, shared).eval() if same else pack(self.model)
            self._stamp = stamp
        return self._runner

    def _new_cache(self, rows: int, capacity: int) -> KVCache:
        config, weight = self.model.config, self.model.wte.weight
        return KVCache.empty(
            n_layer=config.n_layer,
            rows=rows,
            n_head=config.n_head,
            capacity=capacity,
            head_dim=config.n_embd // config.n_head,
            device=weight.device,
            dtype=weight.dtype,
        )

    def _allocate(self, prompts: int, capacity: int) -> KVCache:
        """An empty cache for the rows that may run at once, in the last call's memory when that suffices."""
        rows = round_up(min(prompts, self.max_rows), ROW_BLOCK)
        old, weight = self._cache, self.model.wte.weight
        if (
            old is None
            or old.capacity < capacity
            or len(old.lengths) < rows
            or old.keys.dtype != weight.dtype
            or old.keys.device != weight.device
        ):
            self._cache = old = None  # freed before its successor is allocated
            self._cache = old = self._new_cache(rows, capacity)
        cache = old.first(rows)
        cache.lengths.zero_()
        cache.longest = 0
        return cache

    def _prefill(
        self,
        model: GPT2,
        slots: Slots,
        chosen: np.ndarray,
        prompts: Sequence[Sequence[int]],
        first: int,
    ) -> None:
        """Start the prompts from ``first`` on in the chosen slots; their last tokens are yet to be fed."""
        device = slots.last.device
        lengths = np.array([len(prompts[first + i]) - 1 for i in range(len(chosen))])
        widths = -(-lengths // self.width_block) * self.width_block
        widths = np.minimum(widths, min(self.model.config.n_positions, slots.cache.capacity))
        for width in np.unique(widths[widths > 0]):
            # Rows of one width pass together: attention then sums a row's columns as it would for the row alone.
            group, at_once = np.flatnonzero(widths == width), max(1, PREFILL_TOKENS // int(width))
            for part in np.split(group, range(at_once, len(group), at_once)):
                batch = np.full((len(part), width), self.pad_id)
                for row, i in zip(batch, part, strict=True):
                    row[: lengths[i]] = prompts[first + int(i)][:-1]
                cache = slots.cache.at(torch.from_numpy(chosen[part]).to(device))
                model(torch.from_numpy(batch).to(device), cache=cache)  # right-padded rows need no mask
        last = np.array([prompts[first + i][-1] for i in range(len(chosen))])
        slots.start(chosen, np.arange(first, first + len(chosen)), lengths, last)

    def _decode(
        self,
        model: GPT2,
        slots: Slots,
        steps: int,
        draws: Tensor,
        tokens: Tensor,
        logprobs: Tensor,
        sampling: Sampling,
    ) -> None:
        """Draw ``steps`` tokens for every busy slot; the device is never waited for."""
        cache, n = slots.view(), slots.active
        busy, last, index, done = slots.busy[:n], slots.last[:n], slots.index[:n], slots.done[:n]
        for _ in range(steps):
            logits = model.logits(model(last[:, None], attention_mask=busy, cache=cache)[:, 0])  # (n, V)
            young = index % slots.budget + 1 < sampling.min_new_tokens
            drawn, drawn_logprobs = sample(logits, draws[index], sampling, banned=self._ban(logits, young, sampling))
            tokens[index] = drawn
            logprobs[index] = drawn_logprobs
            last.copy_(drawn)
            done |= drawn == self.eos_id
            index += busy[:, 0]

    def _ban(self, logits: Tensor, young: Tensor, sampling: Sampling) -> Tensor | None:
        """(B, V) True on EOS in the rows (B,) that are too young to end; None when no row can be."""
        if sampling.min_new_tokens <= 1:
            return None
        banned = torch.zeros_like(logits, dtype=torch.bool)
        banned[:, self.eos_id] = young
        return banned

    def _collect(self, tokens: Tensor, logprobs: Tensor) -> list[Completion]:
        """Completions of tokens and logprobs (N, max_new_tokens), each cut after its first EOS."""
        is_eos = tokens == self.eos_id
        ends = torch.where(is_eos.any(1), is_eos.int().argmax(1) + 1, tokens.shape[1])
        return [
            Completion(tokens=row[:end], logprobs=row_logprobs[:end], finished=row[end - 1] == self.eos_id)
            for row, row_logprobs, end in zip(tokens.tolist(), logprobs.tolist(), ends.tolist(), strict=True)
        ]
