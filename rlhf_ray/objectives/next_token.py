"""Next-token prediction, as pre-training and supervised fine-tuning share it.

The loss is sum(w * -log p) / sum(w) over the targets of a whole optimiser step, so equal weights cancel, a
weight of 0 removes a token, and neither micro-batches nor ranks nor packing change it.

Left out on purpose: z-loss and label smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_ray.data import pack
from rlhf_ray.models import GPT2
from rlhf_ray.models.hf_weights import load_policy, save_policy
from rlhf_ray.models.layout import Layout
from rlhf_ray.models.lora import merged
from rlhf_ray.objectives.base import Batch, Dataset, Report
from rlhf_ray.ops.logprobs import before, token_logprobs, weighted_nll_sum
from rlhf_ray.tokenizer import Tokenizer, write_hf_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """Consecutive tokens that nothing outside them explains."""

    tokens: list[int]
    weights: list[float]
    """Weight of each token as a target; 0 where it is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One or several documents in a row."""

    tokens: np.ndarray
    """(T,) int32."""
    document_ids: np.ndarray
    """(T,) int32: runs of equal ids are documents; 0 is padding."""
    weights: np.ndarray
    """(T,) float32: weight of each token as a target, 0 at the first of a document."""
    length: int
    """Tokens before the padding."""
    weight: float
    """Sum of the weights."""


def to_rows(documents: Sequence[Document], *, max_length: int, packing: bool) -> list[TokenRow]:
    """Packed rows of ``max_length`` tokens, or one row a document; rows without a target are left out."""
    if packing:
        packed = pack(
            [document.tokens for document in documents],
            max_length,
            weights=[document.weights for document in documents],
        )
        parts = list(zip(packed.tokens, packed.document_ids, packed.weights, strict=True))
    else:
        parts = [
            (
                np.array(d.tokens),
                np.ones(len(d.tokens), np.int64),
                np.array([0.0, *d.weights[1:]], np.float32),
            )
            for d in documents
        ]
    rows = [
        TokenRow(
            tokens=tokens.astype(np.int32),
            document_ids=document_ids.astype(np.int32),
            weights=weights,
            length=int((document_ids != 0).sum()),
            weight=float(weights.sum(dtype=np.float64)),
        )
        for tokens, document_ids, weights in parts
    ]
    return [row for row in rows if row.weight > 0]


def collate(rows: Sequence[TokenRow]) -> Batch:
    """tokens and document_ids (B, T) int64, and weights (B, T) float32; zeros to the right."""
    width = max(row.length for row in rows)

    def padded(name: str, dtype: type[np.generic]) -> Tensor:
        block = np.zeros((len(rows), width), dtype)
        for b, row in enumerate(rows):
            block[b, : row.length] = getattr(row, name)[: row.length]
        return torch.from_numpy(block)

    return {
        "tokens": padded("tokens", np.int64),
        "document_ids": padded("document_ids", np.int64),
        "weights": padded("weights", np.float32),
    }


def target_states(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states (n, D) before the targets, in their order, and the targets' mask (B, T) in host memory."""
    mask = (batch["weights"] != 0).cpu()
    layout = Layout.of(batch["document_ids"], read=before(mask), device=batch["tokens"].device)
    return model.states(batch["tokens"], layout), mask


def target_logprobs(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) float32 of the targets, and their mask (B, T)."""
    states, mask = target_states(model, batch)
    logprobs, _ = token_logprobs(states, model.wte.weight, batch["tokens"].cpu(), mask)
    return logprobs, mask


class NextToken:
    """The part of an objective that any next-token objective has; subclasses add data and the first model."""

    stage = ""
    metric = "eval/loss"
    mode: Literal["max", "min"] = "min"
    row_kind: type[Any] = TokenRow
    row_options: tuple[str, ...]
    config: Any
    template: str
    tokenizer: Tokenizer

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing: saving and reporting need nothing but the model."""

    def finish(self, model: nn.Module, copy: nn.Module) -> None:
        """Nothing: the copy is the model."""

    def load(self, folder: Path, device: torch.device) -> GPT2:
        """The model as ``save`` left it."""
        return load_policy(folder, device=device, dtype=torch.float32)

    def collate(self, rows: Sequence[TokenRow]) -> Batch:
        """tokens, document_ids and weights, each (B, T)."""
        return collate(rows)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar: the sum of -w log p over the targets, in nats."""
        assert isinstance(model, GPT2)
        states, mask = target_states(model, batch)
        mask = mask.to(states.device)
        return weighted_nll_sum(states, model.wte.weight, batch["tokens"][mask], batch["weights"][mask])

    def facts(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, 2) float64: the weighted loss of each row, and the weight of its targets."""
        assert isinstance(model, GPT2)
        logprobs, _ = target_logprobs(model, batch)
        weights = batch["weights"].double()
        return torch.stack([-(logprobs.double() * weights).sum(1), weights.sum(1)], dim=1)

    def metrics(self, facts: Tensor) -> dict[str, float]:
        """Nats a target token, and their exponential."""
        loss = (facts[:, 0].sum() / facts[:, 1].sum()).item()
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a ``GPT2LMHeadModel`` folder with the tokenizer's files."""
        assert isinstance(model, GPT2)
        ids = self.tokenizer
        save_policy(merged(model), folder, pad_id=ids.pad_id, bos_id=ids.bos_id, eos_id=ids.eos_id)
        write_hf_tokenizer(folder, self.tokenizer, self.template)

    def report(self, folder: Path, facts: Tensor, dataset: Dataset, device: torch.device) -> Report:
        """The perplexity of the held-out targets."""
        if not len(facts):
            return Report(metrics={}, lines=["nothing held out: no perplexity to report"])
        metrics = self.metrics(facts)
        line = (
            f"held-out perplexity per token {metrics['eval/perplexity']:.3f} "
            f"(loss {metrics['eval/loss']:.4f} nats over {int((facts[:, 1]).sum())} targets)"
        )
        return Report(metrics=metrics, lines=[line])
