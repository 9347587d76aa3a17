"""Supervised fine-tuning: the assistant's tokens given the conversation before them (Ouyang et al. 2022).

A row is the template's conversation.  With ``completion_only`` the targets are the assistant's tokens, the
EOS that closes each of its turns included; otherwise every token but the first.

Left out on purpose: cutting in the middle of an answer, which would teach answers without an end.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from rlhf_ray.config import SFTConfig, repository_path
from rlhf_ray.data import ChatRow, read_chats, split_by_prompt
from rlhf_ray.models import GPT2
from rlhf_ray.models.folders import model_folder
from rlhf_ray.models.gpt2 import MLP, Attention
from rlhf_ray.models.hf_weights import load_policy
from rlhf_ray.objectives.adapters import adapters_of
from rlhf_ray.objectives.base import Dataset, check_length, model_files
from rlhf_ray.objectives.next_token import Document, NextToken, to_rows
from rlhf_ray.tokenizer import Tokenizer, find_template


class SFT(NextToken):
    """Imitation of the assistant's turns."""

    stage = "sft"
    row_options: tuple[str, ...] = (
        "seed",
        "held_out",
        "max_length",
        "max_bad_rows",
        "template",
        "completion_only",
        "packing",
    )

    def __init__(self, config: SFTConfig) -> None:
        """Find the policy and its tokenizer; ValueError when one is missing."""
        self.config = config
        self.folder = model_folder(config.policy)
        self.tokenizer = Tokenizer.load(self.folder)
        self.template = config.template
        self.adapters = adapters_of(config, self.folder, self.tokenizer)

    def inputs(self) -> list[Path]:
        """The conversations, and the policy's weights and vocabulary."""
        return [*(repository_path(path) for path in self.config.data), *model_files(self.folder)]

    def build(self, device: torch.device) -> GPT2:
        """The pre-trained policy, its embedding grown by the special tokens where it lacks them."""
        return self._prepared(self.adapters.build(device) if self.adapters else self._load(self.folder, device))

    def load(self, folder: Path, device: torch.device) -> GPT2:
        """The model as ``save`` left it."""
        if not self.adapters:
            return self._prepared(self._load(folder, device))
        model = self._prepared(self.adapters.build(device))
        self.adapters.load(model, folder)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a ``GPT2LMHeadModel`` folder with the tokenizer's files, and the adapters inside it."""
        super().save(model, folder)
        if self.adapters:
            self.adapters.save(model, folder)

    def _load(self, folder: Path, device: torch.device) -> GPT2:
        return load_policy(folder, device=device, vocab_size=self.tokenizer.vocab_size)

    def _prepared(self, model: GPT2) -> GPT2:
        check_length(self.config.max_length, model.config.n_positions)
        set_dropout(model, self.config.dropout)
        return model

    def dataset(self) -> Dataset:
        """Conversations as rows; too long ones lose their last turns, or are dropped when no answer fits."""
        config = self.config
        chats = [row for path in config.data for row in read_chats(repository_path(path), config.max_bad_rows)]
        sides = split_by_prompt(chats, config.held_out, config.seed)
        fitted = [[self._document(row) for row in side] for side in sides]
        train, held_out = (
            to_rows([d for d, _ in side if d], max_length=config.max_length, packing=config.packing) for side in fitted
        )
        if not train:
            raise ValueError(
                f"data = {', '.join(map(str, config.data))}: no conversation is left to train on; "
                f"raise max_length ({config.max_length}) or lower held_out ({config.held_out})"
            )
        everything = [pair for side in fitted for pair in side]
        counts = {
            "conversations": len(chats),
            "held out": len(sides[1]),
            "cut": sum(cut for document, cut in everything if document),
            "dropped as too long": sum(document is None for document, _ in everything),
            "training targets": sum(int((row.weights > 0).sum()) for row in train),
        }
        return Dataset(train=train, held_out=held_out, counts=counts)

    def _document(self, row: ChatRow) -> tuple[Document | None, bool]:
        """The conversation up to the last answer that ends within ``max_length``, None when none does;
        whether cut.
        """
        ids, is_answer = find_template(self.template).conversation_ids(self.tokenizer, row.messages)
        cut = len(ids) > self.config.max_length
        if cut:
            eos = self.tokenizer.eos_id
            ends = [t for t in range(self.config.max_length) if is_answer[t] and ids[t] == eos]
            if not ends:
                return None, cut
            ids, is_answer = ids[: ends[-1] + 1], is_answer[: ends[-1] + 1]
        targets = is_answer if self.config.completion_only else [True] * len(ids)
        return Document(tokens=ids, weights=[row.weight * target for target in targets]), cut


def set_dropout(model: GPT2, dropout: float) -> None:
    """Make every dropout of the model act with this probability while training."""
    model.config = replace(model.config, dropout=dropout)
    for module in model.modules():
        if isinstance(module, (Attention, MLP)):
            module.dropout = dropout
