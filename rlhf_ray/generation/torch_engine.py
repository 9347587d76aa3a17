"""Generation on plain torch: a preallocated cache, ragged prompts, continuous batching.

A prompt is prefilled up to its last token; that token and every drawn one then pass through the same decode
step, so there is one place where tokens are drawn.  Slots whose row has ended are given to waiting prompts;
when none wait, the batch shrinks.  A row's tokens depend on its prompt, its uniforms and the weights alone.

Left out on purpose: CUDA graphs, paging, prefix sharing and speculative decoding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.generation.packed import pack, packable
from rlhf_ray.generation.record import Record
from rlhf_ray.generation.requests import Completion, Engine, Stops, check_requests
from rlhf_ray.generation.sampling import Sampling, sample
from rlhf_ray.generation.slots import ROW_BLOCK, Slots
from rlhf_ray.models.gpt2 import GPT2
from rlhf_ray.models.kv_cache import COLUMN_BLOCK, KVCache, round_up

PREFILL_TOKENS = 8192
"""Tokens of one prefill pass, which bounds its memory."""


class TorchEngine(Engine):
    """An engine for any model; its rows come in whole blocks of 16."""

    def __init__(self, model: GPT2, **options: Any) -> None:
        """``options`` are those of every engine."""
        super().__init__(model, **options)
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
        """One completion per prompt; see ``Engine``."""
        check_requests(prompts, uniforms, sampling, self.model.config.n_positions)
        if not prompts:
            return []
        model, stops = self._current(), Stops(sampling, self.eos_id, self.text)
        N, budget = len(prompts), sampling.max_new_tokens
        record = Record.empty(uniforms[:, :budget], stops, self.model.wte.weight.device)
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
            self._decode(model, slots, steps, record, sampling)
            if stops.strings:
                self._stop_at_strings(slots, steps, record, stops, sampling)
            slots.stepped(steps)
        return record.completions(stops, sampling)

    @torch.inference_mode()
    def stream(self, prompt: Sequence[int], uniforms: np.ndarray, sampling: Sampling) -> Iterator[int]:
        """The tokens of one completion as they are drawn; see ``Engine``.

        A row alone is not padded to a block: its logits may differ from ``generate``'s in the last bits.
        """
        check_requests([prompt], uniforms[None], sampling, self.model.config.n_positions)
        model, device = self._current(), self.model.wte.weight.device
        stops, said = Stops(sampling, self.eos_id, self.text), list[int]()
        banned_ids = torch.from_numpy(stops.ids).to(device)
        cache = self._new_cache(1, len(prompt) + sampling.max_new_tokens)
        tokens = torch.tensor([prompt], dtype=torch.int64, device=device)
        if len(prompt) > 1:
            model(tokens[:, :-1], cache=cache)
        last = tokens[:, -1]  # (1,)
        draws = torch.from_numpy(np.ascontiguousarray(uniforms)).to(device)
        for t in range(sampling.max_new_tokens):
            logits = model.logits(model(last[:, None], cache=cache)[:, 0])  # (1, V)
            young = torch.tensor([t + 1 < sampling.min_new_tokens], device=device)
            banned = _ban(logits, young, banned_ids, sampling)
            last = sample(logits, draws[t : t + 1], sampling, banned=banned).tokens
            said.append(int(last))
            yield said[-1]
            if stops.end(said[-1:], 1) or (t + 1 >= sampling.min_new_tokens and stops.completes(said)):
                return

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

    def _decode(self, model: GPT2, slots: Slots, steps: int, record: Record, sampling: Sampling) -> None:
        """Draw ``steps`` tokens for every busy slot; the device is never waited for."""
        cache, n = slots.view(), slots.active
        busy, last, index, done = slots.busy[:n], slots.last[:n], slots.index[:n], slots.done[:n]
        for _ in range(steps):
            logits = model.logits(model(last[:, None], attention_mask=busy, cache=cache)[:, 0])  # (n, V)
            young = index % slots.budget + 1 < sampling.min_new_tokens
            banned = _ban(logits, young, record.stop_ids, sampling)
            drawn = sample(logits, record.uniforms[index], sampling, banned=banned)
            record.tokens[index] = drawn.tokens
            record.logprobs[index] = drawn.logprobs
            record.log_kept[index] = drawn.log_kept
            last.copy_(drawn.tokens)
            done |= (drawn.tokens[:, None] == record.stop_ids).any(1)
            index += busy[:, 0]

    def _stop_at_strings(self, slots: Slots, steps: int, record: Record, stops: Stops, sampling: Sampling) -> None:
        """Mark the slots whose text has come to hold a stop string within the last ``steps`` tokens."""
        budget, tokens = slots.budget, record.tokens.view(-1, slots.budget).cpu()
        for slot in slots.taken:
            count = budget - int(slots.left[slot]) + steps
            said = tokens[slots.prompt[slot], :count].tolist()
            ends = (
                stops.completes(said[:t]) for t in range(max(count - steps + 1, sampling.min_new_tokens), count + 1)
            )
            if any(ends):
                slots.done[slot] = True


def _ban(logits: Tensor, young: Tensor, stop_ids: Tensor, sampling: Sampling) -> Tensor | None:
    """(B, V) True on stop tokens in the rows (B,) that are too young to end; None when no row can be."""
    if sampling.min_new_tokens <= 1:
        return None
    banned = torch.zeros_like(logits, dtype=torch.bool)
    banned[:, stop_ids] = young[:, None]
    return banned
