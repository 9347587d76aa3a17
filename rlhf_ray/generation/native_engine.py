"""Generation on a CPU through the native pass: fixed rows of a cache, refilled the moment one is free.

A step is one pass over the rows that are busy, whichever they are: nothing is padded or moved, and the batch shrinks by
itself.  Prompts are prefilled together, whatever their lengths; of equal prompts (the siblings of a group) one is, and
the others get a copy of its keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from rlhf_ray.generation.native_model import NativeModel
from rlhf_ray.generation.requests import Completion, Engine, Stops, check_requests
from rlhf_ray.generation.sampling import Drawn, Sampling, sample
from rlhf_ray.models.gpt2 import GPT2
from rlhf_ray.profiling import span

HEAD_ROWS = 64
"""Rows whose logits exist at once."""


class NativeEngine(Engine):
    """An engine for float32 and bfloat16 weights on a CPU; ``native_problem`` says whether a model fits it."""

    def __init__(self, model: GPT2, **options: Any) -> None:
        """``options`` are those of every engine."""
        super().__init__(model, **options)
        self._native = NativeModel(model)
        self._logits = torch.empty(0)

    def generate(self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling) -> list[Completion]:
        """One completion per prompt; see ``Engine``."""
        check_requests(prompts, uniforms, sampling, self.model.config.n_positions)
        made: list[Completion | None] = [None] * len(prompts)
        if prompts:
            for row, completion in self._run(prompts, uniforms, sampling, Stops(sampling, self.eos_id, self.text)):
                made[row] = completion
        return [completion for completion in made if completion is not None]

    def stream(self, prompt: Sequence[int], uniforms: np.ndarray, sampling: Sampling) -> Iterator[int]:
        """The tokens of one completion as they are drawn; see ``Engine``."""
        check_requests([prompt], uniforms[None], sampling, self.model.config.n_positions)
        stops, native = Stops(sampling, self.eos_id, self.text), self._native
        native.refresh()
        native.reserve(1, len(prompt) + sampling.max_new_tokens)
        tokens = np.array(prompt, dtype=np.int64)
        if len(prompt) > 1:
            native.store(tokens[:-1], np.zeros(len(prompt) - 1, dtype=np.int64), np.arange(len(prompt) - 1))
        said = [int(tokens[-1])]
        for t in range(sampling.max_new_tokens):
            at = np.array([len(prompt) - 1 + t])
            hidden = native.forward(np.array(said[-1:]), np.zeros(1, dtype=np.int64), at)
            young = np.array([t + 1 < sampling.min_new_tokens])
            said.append(int(self._draw(hidden, uniforms[t : t + 1].copy(), young, stops, sampling)[0][0]))
            yield said[-1]
            if said[-1] in stops.ids or (not young[0] and stops.completes(said[1:])):
                return

    def release(self) -> None:
        """Free cache, packed weights and logits."""
        self._native.release()
        self._logits = torch.empty(0)

    def _run(
        self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling, stops: Stops
    ) -> Iterator[tuple[int, Completion]]:
        """Rows and their completions, in the order in which they end."""
        N, budget, native = len(prompts), sampling.max_new_tokens, self._native
        native.refresh()
        native.reserve(min(N, self.max_rows), max(map(len, prompts)) + budget)
        said = np.zeros((N, budget), dtype=np.int64)
        logprobs, log_kept = np.zeros((2, N, budget), dtype=np.float32)
        drawn = np.zeros(N, dtype=np.int64)  # tokens that each prompt has so far
        last = np.array([prompt[-1] for prompt in prompts], dtype=np.int64)
        position = np.array([len(prompt) - 1 for prompt in prompts], dtype=np.int64)
        slot = np.full(N, -1, dtype=np.int64)
        free = list(range(min(N, self.max_rows)))[::-1]
        held: dict[int, tuple[int, ...]] = {}  # slot: the prompt in its first columns
        busy = np.empty(0, dtype=np.int64)  # prompts being answered
        waiting = 0
        while waiting < N or len(busy):
            if free and waiting < N:
                begun = np.arange(waiting, min(N, waiting + len(free)))
                waiting += len(begun)
                slot[begun] = [free.pop() for _ in begun]
                with span("prefill"):
                    self._prefill(prompts, begun, slot, held)
                busy = np.concatenate([busy, begun])
            with span("decode"):
                hidden = native.forward(last[busy], slot[busy], position[busy])
            t = drawn[busy]
            young = t + 1 < sampling.min_new_tokens
            with span("draw"):
                tokens, said_logprobs, kept = self._draw(hidden, uniforms[busy, t], young, stops, sampling)
            said[busy, t], logprobs[busy, t], log_kept[busy, t] = tokens, said_logprobs, kept
            last[busy] = tokens
            position[busy] += 1
            drawn[busy] += 1
            stopped = np.isin(tokens, stops.ids)
            if stops.strings:
                completed = [stops.completes(said[row, : drawn[row]].tolist()) for row in busy]
                stopped |= np.array(completed) & ~young
            ended = stopped | (drawn[busy] == budget)
            for row, finished in zip(busy[ended].tolist(), stopped[ended].tolist(), strict=True):
                free.append(int(slot[row]))
                answer, chances, shares = (x[row, : drawn[row]].tolist() for x in (said, logprobs, log_kept))
                yield row, Completion(tokens=answer, logprobs=chances, log_kept=shares, finished=finished)
            busy = busy[~ended]

    def _prefill(
        self, prompts: Sequence[Sequence[int]], begun: np.ndarray, slot: np.ndarray, held: dict[int, tuple[int, ...]]
    ) -> None:
        """Put all but the last token of the prompts ``begun`` into their slots."""
        for row in begun:
            held.pop(int(slot[row]), None)  # about to be overwritten
        holder = {prompt: number for number, prompt in held.items()}
        first: list[int] = []
        copies: list[tuple[int, int, int]] = []
        for row in begun.tolist():
            prompt, number = tuple(prompts[row]), int(slot[row])
            if prompt in holder:
                copies.append((holder[prompt], number, len(prompt) - 1))
            else:
                holder[prompt] = number
                first.append(row)
            held[number] = prompt
        tokens = [np.array(prompts[row][:-1], dtype=np.int64) for row in first]
        if sum(map(len, tokens)):
            lengths = np.array([len(x) for x in tokens])
            positions = np.concatenate([np.arange(length) for length in lengths])
            self._native.store(np.concatenate(tokens), np.repeat(slot[first], lengths), positions)
        for source, target, length in copies:
            self._native.copy_row(source, target, length)

    def _draw(
        self, hidden: np.ndarray, uniforms: np.ndarray, young: np.ndarray, stops: Stops, sampling: Sampling
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, logprobs and log_kept (M,) each, of hidden states (M, D); the ``young`` (M,) rows may not end."""
        rows = min(len(hidden), HEAD_ROWS)
        if len(self._logits) < rows:
            self._logits = torch.empty(rows, self.model.config.vocab_size)
        parts = []
        for start in range(0, len(hidden), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            logits = self._native.logits(hidden[part], self._logits)
            if sampling.truncated or sampling.temperature == 0 or len(stops.ids) > 1:
                parts.append(_sample(logits, uniforms[part], young[part], stops, sampling))
            else:
                banned = np.where(young[part], stops.ids[0], -1)
                parts.append(self._native.draw(logits, uniforms[part], banned, sampling.temperature))
        tokens, logprobs, log_kept = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return tokens, logprobs, log_kept


def _sample(
    logits: torch.Tensor, uniforms: np.ndarray, young: np.ndarray, stops: Stops, sampling: Sampling
) -> tuple[np.ndarray, ...]:
    """The same by plain torch, which knows every way of sampling."""
    banned = None
    if young.any():
        banned = torch.zeros_like(logits, dtype=torch.bool)
        banned[:, torch.from_numpy(stops.ids)] = torch.from_numpy(young)[:, None]
    drawn: Drawn = sample(logits, torch.from_numpy(uniforms), sampling, banned=banned)
    return tuple(x.numpy() for x in drawn)
