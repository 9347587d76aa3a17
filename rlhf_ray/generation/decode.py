"""One decode step in memory that never moves: feed every row its last token, draw the next, keep what was drawn.

All shapes follow from how many rows there are and how far they may reach.  Nothing is read back, nothing comes from
the host, and nothing that the step allocates outlives it, so a CUDA graph can hold it as it is.

Left out on purpose: which rows run and when they end, which the host decides between steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.generation.record import Record
from rlhf_ray.generation.sampling import sample
from rlhf_ray.generation.slots import Slots
from rlhf_ray.models.gpt2 import GPT2


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """What a step reads and writes."""

    model: GPT2
    slots: Slots
    record: Record

    def run(self, rows: int, reach: int) -> None:
        """Draw a token for each of the first ``rows`` slots; none of them then holds more than ``reach`` tokens."""
        slots, record, sampling = self.slots, self.record, self.record.sampling
        busy, last, index, done = (x[:rows] for x in (slots.busy, slots.last, slots.index, slots.done))
        cache = slots.cache.first(rows)
        cache.longest = reach - 1
        logits = self.model.logits(self.model(last[:, None], attention_mask=busy, cache=cache)[:, 0])  # (rows, V)
        banned = None
        if sampling.min_new_tokens > 1:
            young = index % sampling.max_new_tokens + 1 < sampling.min_new_tokens  # (rows,)
            banned = young[:, None] & record.stops
        drawn = sample(logits, record.uniforms.index_select(0, index), sampling, banned=banned)
        record.tokens.index_copy_(0, index, drawn.tokens)
        record.logprobs.index_copy_(0, index, drawn.logprobs)
        record.log_kept.index_copy_(0, index, drawn.log_kept)
        last.copy_(drawn.tokens)
        done |= record.stops.index_select(0, drawn.tokens)
        index += busy[:, 0]
