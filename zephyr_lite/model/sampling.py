"""Sampling in which each row of a batch has settings and a seed of its own.

torch's generator draws for a whole batch, so an answer would depend on the others in it. Here a row's draws depend on its own
seed and on the position in its answer; the other rows change it by rounding only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn.

    Attributes:
        max_new_tokens: its maximum length, at least 1.
        temperature: 0 is greedy.
        top_p: the smallest set of tokens with at least this probability; None: all.
        seed: of its draws.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float | None = None
    seed: int = 0


class RowSampler:
    """Chooses the next token of each row by the inverse of the cumulative distribution at one uniform number."""

    def __init__(self, rows: Sequence[Sampling]) -> None:
        self._rows = rows
        self._draws = [random.Random(row.seed) for row in rows]

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The next token of each row, from logits [rows, vocab] → [rows] int64."""
        chosen = scores.argmax(dim=-1)
        for place, (row, draws) in enumerate(zip(self._rows, self._draws)):
            if row.temperature > 0:
                chosen[place] = _draw(scores[place].double(), row, draws.random())
        return chosen


def _draw(logits: torch.Tensor, row: Sampling, uniform: float) -> torch.Tensor:
    # the maximum is subtracted first: a temperature close to 0 then divides differences, and nothing overflows
    probabilities = torch.softmax((logits - logits.max()) / row.temperature, dim=-1)
    if row.top_p is not None and row.top_p < 1:
        ranked, order = probabilities.sort(descending=True, stable=True)  # of equal ones the first counts
        kept = order[ranked.cumsum(-1) - ranked < row.top_p]
        probabilities = torch.zeros_like(probabilities).scatter_(0, kept, probabilities[kept])
    total = probabilities.cumsum(-1)
    found = torch.searchsorted(total, total[-1:] * uniform, right=True)[0]
    # rounding could end behind the last token that has a probability
    return found.clamp(max=int(probabilities.nonzero()[-1]))
