"""Pre-training: every token of a text given the tokens before it.

A document is ``<|bos|>``, its text and ``<|eos|>``.  Documents longer than a row are split into windows
that overlap by one token, so that every token but the first is a target exactly once; shorter ones are
packed.

Left out on purpose: streaming of text (a corpus is held in memory while it is tokenised, and afterwards where there
is no cache) and mixing of sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from rlhf_ray.config import PretrainConfig, repository_path
from rlhf_ray.data import TextRow, read_text, split_by_prompt
from rlhf_ray.models import GPT2, preset
from rlhf_ray.models.folders import model_folder
from rlhf_ray.models.gpt2 import PRESETS
from rlhf_ray.models.hf_weights import load_policy
from rlhf_ray.objectives.base import Dataset, check_length, model_files
from rlhf_ray.objectives.next_token import Document, NextToken, to_rows
from rlhf_ray.tokenizer import Tokenizer


def windows(ids: list[int], length: int) -> Iterator[list[int]]:
    """Pieces of at most ``length`` ids, each beginning with the last id of the one before it."""
    for start in range(0, max(len(ids) - 1, 1), length - 1):
        yield ids[start : start + length]


class LanguageModel(NextToken):
    """Language modelling on raw text."""

    stage = "pretrained"
    template = "plain"
    row_options: tuple[str, ...] = ("seed", "held_out", "max_length", "max_tokens", "max_bad_rows")

    def __init__(self, config: PretrainConfig) -> None:
        """Open the tokenizer; ValueError when it, or the policy to go on from, is missing or does not fit."""
        self.config = config
        self.tokenizer = Tokenizer.load(repository_path(config.tokenizer))
        self.folder = None if config.policy is None else model_folder(config.policy)
        if self.folder is not None and Tokenizer.load(self.folder).fingerprint != self.tokenizer.fingerprint:
            raise ValueError(
                f"policy = {config.policy}: it has another vocabulary than tokenizer = {config.tokenizer}; "
                "name the policy's own folder as tokenizer"
            )
        if self.folder is None:
            check_length(config.max_length, PRESETS[config.preset]["n_positions"])

    def inputs(self) -> list[Path]:
        """The corpus, the vocabulary and the weights to go on from."""
        tokenizer = repository_path(self.config.tokenizer)
        weights = [] if self.folder is None else model_files(self.folder)
        texts = [repository_path(path) for path in self.config.data]
        return [*texts, tokenizer / "vocab.json", tokenizer / "merges.txt", *weights]

    def build(self, device: torch.device) -> GPT2:
        """A new model of the preset, or the one to go on from."""
        vocab_size = self.tokenizer.vocab_size
        if self.folder is None:
            return GPT2(preset(self.config.preset, vocab_size), device=device, dtype=torch.float32)
        model = load_policy(self.folder, device=device, dtype=torch.float32, vocab_size=vocab_size)
        check_length(self.config.max_length, model.config.n_positions)
        return model

    def dataset(self) -> Dataset:
        """Packed windows; documents are held out whole."""
        config = self.config
        texts = [row for path in config.data for row in read_text(repository_path(path), config.max_bad_rows)]
        train, held_out = split_by_prompt(texts, config.held_out, config.seed)
        if config.max_tokens:
            # A file may be sorted, so that its beginning is no sample of it.
            train = [train[i] for i in np.random.default_rng(config.seed).permutation(len(train))]
        train_documents, tokens = self._documents(train, config.max_tokens)
        held_out_documents, held_out_tokens = self._documents(held_out, 0)
        dataset = Dataset(
            train=to_rows(train_documents, max_length=config.max_length, packing=True),
            held_out=to_rows(held_out_documents, max_length=config.max_length, packing=True),
            counts={"documents": len(texts), "training tokens": tokens, "held-out tokens": held_out_tokens},
        )
        if not dataset.train:
            raise ValueError(f"data = {', '.join(map(str, config.data))}: no text is left to train on; lower held_out")
        return dataset

    def _documents(self, rows: list[TextRow], max_tokens: int) -> tuple[list[Document], int]:
        """Windows of the rows, up to ``max_tokens`` tokens (0: all), and their number of tokens."""
        tokenizer, length = self.tokenizer, self.config.max_length
        documents: list[Document] = []
        tokens = 0
        for row in rows:
            if max_tokens and tokens >= max_tokens:
                break
            ids = [tokenizer.bos_id, *tokenizer.encode(row.text), tokenizer.eos_id]
            tokens += len(ids)
            documents += [Document(tokens=piece, weights=[row.weight] * len(piece)) for piece in windows(ids, length)]
        return documents, tokens
