"""Reward modelling: which of two responses is preferred (Bradley-Terry; Stiennon et al. 2020, N+ 2024).

The score is read at the last real token.  What is saved is normalised: its mean on the SFT policy's
samples is 0 and their deviation 1; while it learns, it is read as it is.  The score's bias stays 0,
because no pair can tell it.

Left out on purpose: dropout, which is off, and rewards for single tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_ray.config import RewardModelConfig, repository_path
from rlhf_ray.data import PairRow, PromptRow, read_pairs, read_prompts, split_by_prompt
from rlhf_ray.models import ValueModel
from rlhf_ray.models.folders import model_folder
from rlhf_ray.models.hf_weights import load_policy, load_reward_model, save_reward_model
from rlhf_ray.models.lora import merged
from rlhf_ray.objectives import pair_metrics
from rlhf_ray.objectives.adapters import adapters_of
from rlhf_ray.objectives.base import Batch, Dataset, Report, check_length, model_files
from rlhf_ray.objectives.pair_report import pair_report
from rlhf_ray.objectives.policy_samples import PolicySampler
from rlhf_ray.ops.losses import pair_loss_terms
from rlhf_ray.tokenizer import Tokenizer, find_template, write_hf_tokenizer

NORMALISE, FRESH = 0, 1
"""Numbers of the two draws of samples."""
SCORING_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTokens:
    """A pair as tokens."""

    chosen: np.ndarray
    """(T,) int32: prompt and chosen response, its EOS included."""
    rejected: np.ndarray
    """(T,) int32."""
    chosen_text: str
    """The response alone."""
    rejected_text: str
    margin: float
    """By how much the chosen response should win, in reward units."""
    weight: float = 1.0

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.chosen) + len(self.rejected)


def pad_right(rows: Sequence[Sequence[int] | np.ndarray]) -> tuple[Tensor, Tensor]:
    """tokens (B, T) int64, zeros to the right, and attention_mask (B, T) bool."""
    width = max(len(row) for row in rows)
    tokens = np.zeros((len(rows), width), np.int64)
    mask = np.zeros((len(rows), width), np.bool_)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
        mask[b, : len(row)] = True
    return torch.from_numpy(tokens), torch.from_numpy(mask)


class RewardModel:
    """A score for a whole response, learned from preferences."""

    stage = "reward_model"
    metric = "eval/accuracy"
    mode: Literal["max", "min"] = "max"
    row_kind: type[Any] = PairTokens
    row_options: tuple[str, ...] = ("seed", "held_out", "max_length", "max_bad_rows", "template")

    def __init__(self, config: RewardModelConfig) -> None:
        """Find the policy and its tokenizer; ValueError when one is missing."""
        self.config = config
        self.folder = model_folder(config.policy)
        self.tokenizer = Tokenizer.load(self.folder)
        self.template = find_template(config.template)
        self.adapters = adapters_of(config, self.folder, self.tokenizer)
        self._dtype = torch.float32
        self._sampler: PolicySampler | None = None
        self._samples: list[list[int]] = []

    def inputs(self) -> list[Path]:
        """The pairs, the prompts of the samples, and the policy's weights and vocabulary."""
        prompts = [] if self.config.prompts is None else [repository_path(self.config.prompts)]
        return [*(repository_path(path) for path in self.config.data), *prompts, *model_files(self.folder)]

    def build(self, device: torch.device) -> ValueModel:
        """The policy's trunk with a new score."""
        if self.adapters:
            trunk = self.adapters.build(device)
        else:
            trunk = load_policy(self.folder, device=device, vocab_size=self.tokenizer.vocab_size)
        check_length(self.config.max_length, trunk.config.n_positions)
        return _trainable(ValueModel(trunk))

    def load(self, folder: Path, device: torch.device) -> ValueModel:
        """The model as it was trained: without the normaliser of its copy."""
        if self.adapters:
            adapted = self.build(device)
            self.adapters.load(adapted, folder)
            return adapted
        model = load_reward_model(folder, device=device, dtype=torch.float32)
        model.reward_gain.fill_(1.0)
        model.reward_bias.fill_(0.0)
        return _trainable(model)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Sample the responses that the reward is normalised on."""
        self._dtype = dtype
        count = self.config.normalise_samples
        if count:
            self._sampler = self._open_sampler(device, dtype)
            self._samples = self._sampler.sample(count, draw=NORMALISE)

    def _open_sampler(self, device: torch.device, dtype: torch.dtype) -> PolicySampler:
        config = self.config
        if config.prompts is None:
            rows = [PromptRow(prompt=row.prompt) for row in self._pairs()[0]]
        else:
            rows = read_prompts(repository_path(config.prompts), config.max_bad_rows)
        return PolicySampler(
            self.folder,
            rows,
            template=config.template,
            max_length=config.max_length,
            response_length=config.response_length,
            seed=config.seed,
            device=device,
            dtype=dtype,
        )

    def _pairs(self) -> tuple[list[PairRow], list[PairRow]]:
        """Training pairs and held-out pairs."""
        config = self.config
        rows = [row for path in config.data for row in read_pairs(repository_path(path), config.max_bad_rows)]
        return split_by_prompt(rows, config.held_out, config.seed)

    def dataset(self) -> Dataset:
        """Pairs as tokens; too long prompts lose tokens on the left, pairs with too long responses are
        dropped.
        """
        config = self.config
        sides = self._pairs()
        fitted = [[self._tokens(row) for row in side] for side in sides]
        train, held_out = ([pair for pair, _ in side if pair] for side in fitted)
        if not train:
            raise ValueError(
                f"data = {', '.join(map(str, config.data))}: no pair is left to train on; raise max_length "
                f"({config.max_length}) or lower held_out ({config.held_out})"
            )
        everything = [item for side in fitted for item in side]
        counts = {
            "pairs": len(everything),
            "held out": len(sides[1]),
            "cut": sum(cut for pair, cut in everything if pair),
            "dropped as too long": sum(pair is None for pair, _ in everything),
        }
        return Dataset(train=train, held_out=held_out, counts=counts)

    def _tokens(self, row: PairRow) -> tuple[PairTokens | None, bool]:
        """The pair, None when a response alone is too long; whether its prompt was cut."""
        prompt = self.template.prompt_ids(self.tokenizer, row.prompt)
        chosen, rejected = (self.template.response_ids(self.tokenizer, text) for text in (row.chosen, row.rejected))
        room = self.config.max_length - max(len(chosen), len(rejected))
        if room < 1:
            return None, False
        cut = len(prompt) > room
        if cut:  # both responses see the same prompt, which keeps its first token
            prompt = [prompt[0], *prompt[len(prompt) - room + 1 :]]
        pair = PairTokens(
            chosen=np.array(prompt + chosen, np.int32),
            rejected=np.array(prompt + rejected, np.int32),
            chosen_text=row.chosen,
            rejected_text=row.rejected,
            margin=row.margin,
        )
        return pair, cut

    def collate(self, rows: Sequence[PairTokens]) -> Batch:
        """tokens and attention_mask (2B, T), the chosen rows before the rejected ones, and margin (B,)."""
        tokens, mask = pad_right([*(row.chosen for row in rows), *(row.rejected for row in rows)])
        margin = torch.tensor([row.margin for row in rows], dtype=torch.float32)
        return {"tokens": tokens, "attention_mask": mask, "margin": margin}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar: the sum of the pairs' losses."""
        chosen, rejected = model(batch["tokens"], batch["attention_mask"]).chunk(2)  # (B,) each
        return pair_loss_terms(
            chosen,
            rejected,
            batch["margin"],
            label_smoothing=self.config.label_smoothing,
            centre_coef=self.config.centre_coef,
        ).sum()

    def facts(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, 2) float64: the scores of chosen and rejected, before normalisation."""
        assert isinstance(model, ValueModel)
        scores = (model(batch["tokens"], batch["attention_mask"]) - model.reward_bias) / model.reward_gain
        return torch.stack(scores.double().chunk(2), dim=1)

    def metrics(self, facts: Tensor) -> dict[str, float]:
        """Accuracy (ties wrong), loss and calibration error on the held-out pairs."""
        margins = facts[:, 0] - facts[:, 1]  # (N,)
        return {
            "eval/accuracy": pair_metrics.accuracy(margins),
            "eval/loss": pair_metrics.pair_loss(margins),
            "eval/margin": float(margins.mean()),
            "eval/ece": pair_metrics.expected_calibration_error(pair_metrics.calibration(margins)),
        }

    def finish(self, model: nn.Module, copy: nn.Module) -> None:
        """Normalise the copy on the SFT policy's samples; the model goes on learning with raw scores."""
        assert isinstance(model, ValueModel) and isinstance(copy, ValueModel)
        if self._samples:
            mean, std = pair_metrics.mean_and_std(self.score(model, self._samples))
            copy.set_normaliser(mean=mean, std=std)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a ``GPT2ForSequenceClassification`` folder, and the adapters inside it."""
        assert isinstance(model, ValueModel)
        ids = self.tokenizer
        save_reward_model(merged(model), folder, pad_id=ids.pad_id, bos_id=ids.bos_id, eos_id=ids.eos_id)
        write_hf_tokenizer(folder, ids, self.config.template)
        if self.adapters:
            self.adapters.save(model, folder)

    @torch.inference_mode()
    def score(self, model: ValueModel, rows: Sequence[Sequence[int]]) -> Tensor:
        """(N,) float32: the scores of rows of token ids."""
        device = model.score.weight.device
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = torch.empty(len(rows))
        for start in range(0, len(rows), SCORING_ROWS):
            part = order[start : start + SCORING_ROWS]
            tokens, mask = pad_right([rows[i] for i in part])
            with torch.autocast(device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
                scores[part] = model(tokens.to(device), mask.to(device)).float().cpu()
        return scores

    def report(self, folder: Path, facts: Tensor, dataset: Dataset, device: torch.device) -> Report:
        """Accuracy, also by margin, calibration, what simpler rankers reach, and the normalisation on
        fresh samples.
        """
        model = load_reward_model(folder, device=device, dtype=torch.float32)
        fresh = None
        if self._sampler is not None:
            fresh = self.score(model, self._sampler.sample(self.config.normalise_samples, draw=FRESH))
        train, held_out = (
            [(row.chosen_text, row.rejected_text) for row in side] for side in (dataset.train, dataset.held_out)
        )
        gain, bias = float(model.reward_gain), float(model.reward_bias)
        return pair_report(
            margins=facts[:, 0] - facts[:, 1] if len(facts) else None,
            train=train,
            held_out=held_out,
            fresh=fresh,
            gain=gain,
            bias=bias,
        )


def _trainable(model: ValueModel) -> ValueModel:
    model.score.bias.requires_grad_(False)
    return model
