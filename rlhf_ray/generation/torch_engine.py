"""Generation on plain torch: a preallocated cache, ragged prompts, continuous batching.

A prompt is prefilled up to its last token; that token and every drawn one then pass through the same decode
step, so there is one place where tokens are drawn.  Slots whose row has ended are given to waiting prompts;
when none wait, the batch shrinks.  A row's tokens depend on its prompt, its uniforms and the weights alone.

Left out on purpose: paging, prefix sharing and speculative decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf_ray.generation.decode import DecodeStep
from rlhf_ray.generation.graphs import Graphs
from rlhf_ray.generation.packed import as_it_is, pack, packable
from rlhf_ray.generation.record import Record
from rlhf_ray.generation.requests import Completion, Engine, Stops, check_requests
from rlhf_ray.generation.sampling import Sampling
from rlhf_ray.generation.slots import ROW_BLOCK, Slots, Whole, doubled
from rlhf_ray.models.gpt2 import GPT2
from rlhf_ray.models.kv_cache import COLUMN_BLOCK, KVCache, round_up
from rlhf_ray.profiling import span

PREFILL_TOKENS = 8192
"""Tokens of one prefill pass, which bounds its memory."""

Run = Callable[[int, int], None]
"""``DecodeStep.run``, or what stands for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grain:
    """How coarsely a device's work is cut: whatever is chosen, the rows stay what they are but for rounding."""

    burst: int
    """Decode steps between two looks at which rows have ended, where the host waits for the device."""
    prefill: int
    """Prefill widths are whole multiples of it."""
    columns: int
    """A decode step reads the cache in whole multiples of it."""
    whole: Whole
    """Rounds up numbers of rows, and the columns that are allocated."""
    graphs: bool
    """Decode steps are CUDA graphs, one for every number of rows and of columns."""


FINE = Grain(burst=1, prefill=COLUMN_BLOCK, columns=COLUMN_BLOCK, whole=round_up, graphs=False)
"""For a CPU, where padding costs more than a launch and a look."""
COARSE = Grain(burst=8, prefill=128, columns=64, whole=doubled, graphs=True)
"""For a GPU."""


class TorchEngine(Engine):
    """An engine for any model; its rows come in whole blocks of 16."""

    def __init__(self, model: GPT2, **options: Any) -> None:
        """``options`` are those of every engine."""
        super().__init__(model, **options)
        self.grain = COARSE if model.wte.weight.is_cuda else FINE
        self._runner: GPT2 | None = None
        self._stamp: list[tuple[int, int, int]] = []
        self._slots: Slots | None = None
        self._record: Record | None = None
        self._run: Run | None = None

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling) -> list[Completion]:
        """One completion per prompt; see ``Engine``."""
        check_requests(prompts, uniforms, sampling, self.model.config.n_positions)
        if not prompts:
            return []
        stops, N = Stops(sampling, self.eos_id, self.text), len(prompts)
        model = self._current()
        slots, record, run = self._prepare(model, N, max(map(len, prompts)) + sampling.max_new_tokens, stops, sampling)
        record.begin(uniforms)
        slots.reset(budget=sampling.max_new_tokens, spare=record.spare)
        refill_at = max(1, len(slots.prompt) // 8)
        waiting = 0  # first prompt without a slot
        while waiting < N or len(slots.taken):
            if waiting < N and (len(slots.free) >= refill_at or not len(slots.taken)):
                chosen = slots.free[: N - waiting]
                with span("prefill"):
                    self._prefill(model, slots, chosen, prompts, waiting)
                waiting += len(chosen)
            elif waiting == N:
                slots.compact()
            steps = min(self.grain.burst, int(slots.left[slots.taken].min()))
            longest = int(slots.lengths.max())
            with span("decode"):
                for length in range(longest + 1, longest + steps + 1):
                    run(slots.active, self._reach(slots, length))
            if stops.strings:
                self._stop_at_strings(slots, steps, record, stops)
            slots.stepped(steps)
        return record.completions(N, stops)

    @torch.inference_mode()
    def stream(self, prompt: Sequence[int], uniforms: np.ndarray, sampling: Sampling) -> Iterator[int]:
        """The tokens of one completion as they are drawn; see ``Engine``.

        A row alone is not padded to a block: its logits may differ from ``generate``'s in the last bits.
        """
        check_requests([prompt], uniforms[None], sampling, self.model.config.n_positions)
        stops, budget = Stops(sampling, self.eos_id, self.text), sampling.max_new_tokens
        step = DecodeStep(
            model=self._current(),
            slots=Slots(self._new_cache(1, len(prompt) + budget)),
            record=Record.empty(1, sampling, stops.ids, self.model.wte.weight),
        )
        step.record.begin(uniforms[None])
        step.slots.reset(budget=budget, spare=step.record.spare)
        self._prefill(step.model, step.slots, np.array([0]), [prompt], 0)
        said = list[int]()
        for t in range(budget):
            step.run(1, self._reach(step.slots, len(prompt) + t))
            said.append(int(step.record.tokens[t]))
            yield said[-1]
            if stops.end(said[-1:], 1) or (t + 1 >= sampling.min_new_tokens and stops.completes(said)):
                return

    def _current(self) -> GPT2:
        """The model in the form that runs fastest here, made anew when weights that it holds copies of have changed."""
        copied = packable(self.model)
        stamp = [(id(p), p.data_ptr(), p._version if copied else 0) for p in self.model.parameters()]
        if self._runner is None or stamp != self._stamp:
            self._runner = pack(self.model) if copied else as_it_is(self.model)
            self._stamp, self._run = stamp, None
        return self._runner

    def release(self) -> None:
        """Free cache, records, the copy of the weights and CUDA graphs, whose memory goes with the last of them."""
        self._slots = self._record = self._run = self._runner = None

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

    def _prepare(
        self, model: GPT2, prompts: int, capacity: int, stops: Stops, sampling: Sampling
    ) -> tuple[Slots, Record, Run]:
        """Memory for so many prompts, and the step in it: those of the last call where they suffice."""
        weight, whole = model.wte.weight, self.grain.whole
        rows = min(whole(min(prompts, self.max_rows), ROW_BLOCK), round_up(self.max_rows, ROW_BLOCK))
        if self._slots is None or not self._slots.cache.suits(rows, capacity, weight):
            self._slots = self._record = self._run = None  # freed before their successors are allocated
            capacity = min(whole(capacity, COLUMN_BLOCK), self.model.config.n_positions)
            self._slots = Slots(self._new_cache(rows, capacity), whole)
        if self._record is None or self._record.sampling != sampling or not self._record.holds(prompts):
            self._record = self._run = None
            self._record = Record.empty(whole(prompts, ROW_BLOCK), sampling, stops.ids, weight)
        if self._run is None:
            step = DecodeStep(model=model, slots=self._slots, record=self._record)
            self._run = Graphs(step).run if self.grain.graphs else step.run
        return self._slots, self._record, self._run

    def _reach(self, slots: Slots, length: int) -> int:
        """How far a step reads when the longest row comes to have this length."""
        return min(round_up(length, self.grain.columns), slots.cache.capacity, self.model.config.n_positions)

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
        widths = -(-lengths // self.grain.prefill) * self.grain.prefill
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

    def _stop_at_strings(self, slots: Slots, steps: int, record: Record, stops: Stops) -> None:
        """Mark the slots whose text has come to hold a stop string within the last ``steps`` tokens."""
        tokens, minimum = record.said(), record.sampling.min_new_tokens
        for slot in slots.taken:
            count = slots.budget - int(slots.left[slot]) + steps
            said = tokens[slots.prompt[slot], :count].tolist()
            ends = (stops.completes(said[:t]) for t in range(max(count - steps + 1, minimum), count + 1))
            if any(ends):
                slots.done[slot] = True
