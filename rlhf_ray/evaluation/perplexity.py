"""Perplexity per token: of the assistant's tokens in dialogues, or of every token of plain texts.

exp of the mean of -log p, in nats, over the tokens that are predicted; EOS is one of them.  A text longer
than the context is read in windows, a dialogue is cut at its end.  Only models that share a vocabulary can be
compared by it.

Left out on purpose: sliding windows, which give each token more context at many times the cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_ray.config import EvaluateConfig, repository_path
from rlhf_ray.console import say, table
from rlhf_ray.data.readers import read_chats, read_text
from rlhf_ray.data.records import is_text, records
from rlhf_ray.data.rows import ChatRow, TextRow
from rlhf_ray.evaluation.compare import check_same_vocabulary, write_json
from rlhf_ray.generation.load import find_device, load_policy_with_tokenizer
from rlhf_ray.models.gpt2 import GPT2
from rlhf_ray.objectives.language_model import windows
from rlhf_ray.objectives.next_token import Document, TokenRow, collate, target_logprobs, to_rows
from rlhf_ray.tokenizer import Template, Tokenizer, find_template


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """How surprised a policy is."""

    perplexity: float
    """exp of the mean -log p of a token."""
    tokens: int
    """Tokens that were predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passages:
    """Rows to predict, tokenised and packed."""

    rows: Sequence[TokenRow]
    cut: int
    """Dialogues that lost their end because they were too long."""


def read_rows(path: Path) -> list[TextRow] | list[ChatRow]:
    """Texts when the file is plain text or its first record has a text, else conversations.

    Raises ValueError as file:line when a row is malformed.
    """
    if is_text(path):
        return list(read_text(path))
    first = next(records(path), (0, None))[1]
    return list(read_text(path)) if isinstance(first, dict) and "text" in first else list(read_chats(path))


def to_passages(
    rows: Sequence[TextRow | ChatRow], tokenizer: Tokenizer, template: Template, max_length: int
) -> Passages:
    """Tokenise rows and pack them into ``max_length`` tokens; only what is to be predicted has a weight."""
    documents: list[Document] = []
    cut = 0
    for row in rows:
        if isinstance(row, TextRow):
            ids = [tokenizer.bos_id, *tokenizer.encode(row.text), tokenizer.eos_id]
            documents += [Document(tokens=w, weights=[1.0] * len(w)) for w in windows(ids, max_length)]
        else:
            ids, said = template.conversation_ids(tokenizer, row.messages)
            cut += len(ids) > max_length
            weights = [float(predicted) for predicted in said[:max_length]]
            documents.append(Document(tokens=ids[:max_length], weights=weights))
    return Passages(rows=to_rows(documents, max_length=max_length, packing=True), cut=cut)


@torch.inference_mode()
def measure(policy: GPT2, passages: Passages, *, batch_size: int) -> Perplexity:
    """The policy's perplexity on the passages; ValueError when they hold nothing to predict."""
    device = policy.wte.weight.device
    total, tokens = 0.0, 0
    for start in range(0, len(passages.rows), batch_size):
        batch = collate(passages.rows[start : start + batch_size])
        logprobs, mask = target_logprobs(policy, {name: x.to(device) for name, x in batch.items()})
        total -= float(logprobs.double().sum())
        tokens += int(mask.sum())
    if not tokens:
        raise ValueError("perplexity: the rows hold no token to predict")
    return Perplexity(perplexity=math.exp(total / tokens), tokens=tokens)


def perplexities(config: EvaluateConfig) -> dict[str, dict[str, Perplexity]]:
    """Perplexity of baseline and policy on each of ``config.perplexity``: {file: {"baseline", "policy"}}.

    Raises ValueError when a model or file is missing, or the vocabularies differ.
    """
    device = find_device(config.device)
    policy, tokenizer, recorded = load_policy_with_tokenizer(config.policy, device=device)
    baseline, other, _ = load_policy_with_tokenizer(config.baseline, device=device, field="baseline")
    check_same_vocabulary(tokenizer, other, field="baseline", path=config.baseline)
    template = find_template(config.template or recorded or "chat")
    context = min(policy.config.n_positions, baseline.config.n_positions)
    found: dict[str, dict[str, Perplexity]] = {}
    for path in config.perplexity:
        passages = to_passages(read_rows(repository_path(path)), tokenizer, template, context)
        if passages.cut:
            say(f"{path}: {passages.cut} dialogues exceed the context of {context} tokens and were cut")
        found[str(path)] = {
            "baseline": measure(baseline, passages, batch_size=config.batch_size),
            "policy": measure(policy, passages, batch_size=config.batch_size),
        }
    return found


def show_perplexities(found: dict[str, dict[str, Perplexity]], config: EvaluateConfig) -> None:
    """Print a table of what ``perplexities`` found, and write it to ``config.output`` if set."""
    rows: list[list[object]] = []
    for path, of in found.items():
        before, after = of["baseline"].perplexity, of["policy"].perplexity
        rows.append([path, of["policy"].tokens, before, after, before / after])
    table("Perplexity per token", ["", "tokens", "baseline", "policy", "ratio"], rows)
    if config.output is not None:
        content = {path: {name: of[name].perplexity for name in of} for path, of in found.items()}
        write_json(config.output, content)
