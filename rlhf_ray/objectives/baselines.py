"""What a reward model must beat: preferring by length, and by counting words.

The word counter is a Bradley-Terry model, P(chosen > rejected) = sigmoid(w . (count(chosen) -
count(rejected))), with an L2 penalty on w: logistic regression on differences, without an intercept.  A
reward model that does no better has learned nothing that counting words has not.

Left out on purpose: n-grams, and any look at the prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import regex
import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[str, str]
"""Chosen text, rejected text."""

_WORD = regex.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBaseline:
    """Preferring by number of characters."""

    chosen_is_longer: float
    """Share of the held-out pairs whose chosen text is the longer one."""
    prefers: str
    """longer or shorter: what does better on the training pairs."""
    accuracy: float
    """Of that rule on the held-out pairs; equal lengths are wrong."""


def length_baseline(train: Sequence[Pair], held_out: Sequence[Pair]) -> LengthBaseline:
    """Choose longer or shorter on ``train`` and measure the rule on ``held_out``; both must hold pairs."""
    longer, shorter = _rate(held_out, 1), _rate(held_out, -1)
    prefers_longer = _rate(train, 1) >= _rate(train, -1)
    return LengthBaseline(
        chosen_is_longer=longer,
        prefers="longer" if prefers_longer else "shorter",
        accuracy=longer if prefers_longer else shorter,
    )


def _rate(pairs: Sequence[Pair], sign: int) -> float:
    assert pairs, "no pairs to measure a length on"
    return sum(sign * (len(chosen) - len(rejected)) > 0 for chosen, rejected in pairs) / len(pairs)


def words(text: str) -> Counter[str]:
    """How often each lower-cased word and punctuation mark occurs."""
    return Counter(_WORD.findall(text.lower()))


class BagOfWords:
    """A ranker that knows nothing but word counts."""

    def __init__(self, train: Sequence[Pair], *, l2: float = 1.0, max_steps: int = 200) -> None:
        """Fit on pairs: minimise the sum of -log P(chosen > rejected) plus l2 / 2 |w|^2, by L-BFGS."""
        differences = [_difference(pair) for pair in train]
        vocabulary = sorted({word for difference in differences for word in difference})
        self._index = {word: i for i, word in enumerate(vocabulary)}
        self.weights = torch.zeros(len(vocabulary), dtype=torch.float64, requires_grad=True)  # (F,)
        entries = self._entries(differences)
        optimiser = torch.optim.LBFGS([self.weights], max_iter=max_steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            margins = self._dot(entries, len(differences))  # (N,)
            loss = F.softplus(-margins).sum() + 0.5 * l2 * self.weights.square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        self.weights = self.weights.detach()

    def margins(self, pairs: Sequence[Pair]) -> Tensor:
        """(N,) float64: the log-odds that the first text of each pair is preferred."""
        return self._dot(self._entries([_difference(pair) for pair in pairs]), len(pairs))

    def accuracy(self, pairs: Sequence[Pair]) -> float:
        """Share of the pairs whose chosen text scores higher; ties are wrong."""
        return float((self.margins(pairs) > 0).double().mean())

    def _entries(self, differences: Sequence[dict[str, int]]) -> tuple[Tensor, Tensor]:
        """Where known words differ, (2, E) int64 of pair and word, and by how much, (E,) float64."""
        found = [
            (row, self._index[word], count)
            for row, difference in enumerate(differences)
            for word, count in difference.items()
            if word in self._index
        ]
        places = torch.tensor([entry[:2] for entry in found], dtype=torch.int64).reshape(-1, 2).t()
        return places, torch.tensor([entry[2] for entry in found], dtype=torch.float64)

    def _dot(self, entries: tuple[Tensor, Tensor], rows: int) -> Tensor:
        """(rows,) float64: features times weights."""
        (row, word), counts = entries
        return torch.zeros(rows, dtype=torch.float64).index_add(0, row, counts * self.weights[word])


def _difference(pair: Pair) -> dict[str, int]:
    """Counts in the chosen text minus counts in the rejected one, where they differ."""
    chosen, rejected = words(pair[0]), words(pair[1])
    return {
        word: chosen[word] - rejected[word]
        for word in chosen.keys() | rejected.keys()
        if chosen[word] != rejected[word]
    }
