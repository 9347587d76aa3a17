"""A checkpoint that answers: its model, tokenizer and template behind one method that yields text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rlhf_ray.chat.conversation import Conversation, Prompt
from rlhf_ray.generation import Engine, Sampling, make_engine
from rlhf_ray.generation.load import load_policy_with_tokenizer
from rlhf_ray.tokenizer import StreamDecoder, Template, Tokenizer, find_template


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """One side of a conversation."""

    name: str
    """How the answers are labelled when two checkpoints are compared."""
    engine: Engine
    tokenizer: Tokenizer
    template: Template

    @classmethod
    def load(cls, path: Path, *, template: str | None, device: torch.device, field: str) -> Speaker:
        """Open a folder or run; ``template`` overrides the one that it records.

        Raises ValueError when there is no model or its vocabulary does not fit.
        """
        policy, tokenizer, recorded = load_policy_with_tokenizer(path, device=device, field=field)
        engine = make_engine(policy, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, max_rows=1)
        chosen = find_template(template or recorded or "chat")
        return cls(name=str(path), engine=engine, tokenizer=tokenizer, template=chosen)

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.engine.model.config.n_positions

    def prompt(self, conversation: Conversation, max_new_tokens: int) -> Prompt:
        """What the speaker sees of a conversation; ValueError when the answer leaves no room for it."""
        if max_new_tokens >= self.context:
            raise ValueError(
                f"max_new_tokens = {max_new_tokens} leaves no room for a prompt in {self.name}'s context of "
                f"{self.context} tokens; lower it"
            )
        return conversation.prompt(self.tokenizer, self.template, self.context - max_new_tokens)

    def answer(self, prompt: Prompt, sampling: Sampling, uniforms: np.ndarray) -> Iterator[str]:
        """The answer in pieces of whole characters, up to EOS; any other special token ends it too."""
        decoder = StreamDecoder(self.tokenizer)
        for token in self.engine.stream(prompt.token_ids, uniforms, sampling):
            if token >= self.tokenizer.base_size:
                break
            if text := decoder.push(token):
                yield text
        if text := decoder.flush():
            yield text
