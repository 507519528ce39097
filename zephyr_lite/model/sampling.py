"""Sampling where each row of a batch has settings and a seed of its own, for ``generate``.

torch's generator draws for a whole batch, so that an answer would depend on what else was asked at the same time. Here a
row's draws depend on its own seed and on the place in its answer alone; what is left of the neighbours is rounding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, StoppingCriteria


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn.

    Attributes:
        max_new_tokens: its length at most, at least 1.
        temperature: 0 is greedy.
        top_p: the smallest set of tokens with at least this probability; None: all.
        seed: of its draws.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Sampled:
    """An answer: its text, why it ended ("stop", "length"), its tokens and those of its prompt (the end counts too)."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class RowSampler(LogitsProcessor):
    """Chooses each row's next token, and leaves ``generate`` nothing but that choice.

    Inverse of the cumulative distribution at one uniform number a row and step.
    """

    def __init__(self, rows: Sequence[Sampling]) -> None:
        self._rows = rows
        self._draws = [random.Random(row.seed) for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [rows, vocab] → the same shape, 0 at the chosen token and -inf elsewhere."""
        return torch.full_like(scores, -float("inf")).scatter_(1, self.choose(scores)[:, None], 0.0)

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The next token of each row, from scores [rows, vocab] → [rows] int64."""
        chosen = scores.argmax(dim=-1)
        for place, (row, draws) in enumerate(zip(self._rows, self._draws)):
            if row.temperature > 0:
                chosen[place] = self._draw(scores[place].double(), row, draws.random())
        return chosen

    @staticmethod
    def _draw(logits: torch.Tensor, row: Sampling, uniform: float) -> torch.Tensor:
        # the largest first: a temperature close to 0 then divides differences, and nothing overflows
        probabilities = torch.softmax((logits - logits.max()) / row.temperature, dim=-1)
        if row.top_p is not None and row.top_p < 1:
            kept = _nucleus(probabilities, row.top_p)
            probabilities = torch.zeros_like(probabilities).scatter_(0, kept, probabilities[kept])
        total = probabilities.cumsum(-1)
        found = torch.searchsorted(total, total[-1:] * uniform, right=True)[0]
        # rounding could end behind the last token that has a probability
        return found.clamp(max=int(probabilities.nonzero()[-1]))


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The places of the likeliest tokens that have ``top_p`` between them, from [vocab] → [at most vocab].

    Of equal ones the first count. A whole vocabulary takes 12 ms to sort on a CPU, a tenth of a small model's token, and
    nearly always the set lies among the first few.
    """
    for most in (256, len(probabilities)):
        if most < len(probabilities):
            candidates = probabilities.topk(most).indices.sort().values
        else:
            candidates = torch.arange(len(probabilities), device=probabilities.device)
        ranked, order = probabilities[candidates].sort(descending=True, stable=True)
        within = ranked.cumsum(-1) - ranked < top_p
        # what was left out is as likely as the last candidate at most: it could be within, or equal to one that is
        if most >= len(probabilities) or bool(ranked[within][-1] > ranked[-1]):
            break
    return candidates[order[within]]


class RowLimits(StoppingCriteria):
    """Ends each row at its own length, and all of them when ``stop`` says so."""

    def __init__(self, prompt: int, rows: Sequence[Sampling], stop: Callable[[], bool]) -> None:
        self._prompt, self._limits, self._stop = prompt, [row.max_new_tokens for row in rows], stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        made = input_ids.shape[1] - self._prompt
        done = [self._stop() or made >= limit for limit in self._limits]
        return torch.tensor(done, device=input_ids.device)
