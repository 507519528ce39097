"""What a model says of an adapter: its log-probabilities on conversations and pairs under several suppositions.

Every question is a difference of differences, taken row by row: what doubling BOS (or another template) does to the
model with the adapter, less what it does to the model below it. A base may well prefer one text to another; training
shows in what the adapter changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batch import collate_conversations
from ..data.chat_template import ChatTemplate, Example
from ..data.formats import RowError
from ..data.packing import best_fit
from ..errors import UserError
from ..model.decoder import Decoder

Messages = list[dict[str, str]]
MICRO_TOKENS = 2048
MAX_TOKENS = 1024  # of a row: what comes later in a conversation answers no other question


@dataclass(frozen=True)
class RowSums:
    """Log-probabilities of conversations' answers, in nats.

    Attributes:
        text: [R] float64, sums over the answers' own tokens.
        tokens: [R] float64, how many those are.
        ends: [E] float64, of every end token of every answer.
    """

    text: Tensor
    tokens: Tensor
    ends: Tensor

    @property
    def loss(self) -> float:
        """Nats a token of the answers' own text."""
        return float(-self.text.sum() / self.tokens.sum())


def examples_of(template: ChatTemplate, rows: Sequence[Messages]) -> list[Example]:
    """The rows under a template.

    Raises:
        UserError: none of them can be rendered.
    """
    found, why = [], ""
    for place, messages in enumerate(rows):
        try:
            ids, mask = template.encode(messages)
        except RowError as error:
            why = str(error)
            continue
        if mask[:MAX_TOKENS].any():
            found.append(Example(ids[:MAX_TOKENS], mask[:MAX_TOKENS], "", place))
    if not found:
        raise UserError(f"none of the {len(rows)} conversations can be rendered: {why or 'no answers in them'}.")
    return found


@torch.no_grad()
def row_sums(decoder: Decoder, examples: Sequence[Example], end_ids: Sequence[int]) -> RowSums:
    """Sums for each row, end tokens apart: templates end an answer with different ones."""
    text = torch.zeros(len(examples), dtype=torch.float64)
    tokens = torch.zeros(len(examples), dtype=torch.float64)
    ends: list[Tensor] = []
    for group in best_fit([min(len(e.ids), MICRO_TOKENS) for e in examples], MICRO_TOKENS):
        batch = collate_conversations([examples[i] for i in group]).to(decoder.device)
        logps = decoder.token_logps(batch).double().cpu()
        at = 0
        for row in group:
            example = examples[row]
            targets = torch.from_numpy(example.ids[example.mask].astype(np.int64))
            mine, at = logps[at : at + len(targets)], at + len(targets)
            is_end = torch.isin(targets, torch.tensor(list(end_ids)))
            text[row], tokens[row] = mine[~is_end].sum(), float((~is_end).sum())
            ends.append(mine[is_end])
    return RowSums(text, tokens, torch.cat(ends))


@dataclass(frozen=True)
class Gap:
    """A mean difference over rows, nats a token, and its standard error (infinite for a single row)."""

    mean: float
    error: float

    @property
    def clear(self) -> bool:
        """Above zero by three standard errors and by more than rounding."""
        return self.mean > max(3 * self.error, 0.005)

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f} nats a token"


def gap(of: RowSums, against: RowSums) -> Gap:
    """How much less the answers' text costs in ``of`` than in ``against``, row by row."""
    return _gap(of.text / of.tokens.clamp(min=1) - against.text / against.tokens.clamp(min=1))


def _gap(differences: Tensor) -> Gap:
    n = len(differences)
    return Gap(float(differences.mean()), float(differences.std() / math.sqrt(n)) if n > 1 else math.inf)


def change_of_gap(of: RowSums, against: RowSums, below_of: RowSums, below_against: RowSums) -> Gap:
    """The gap with the adapter, less the gap without it."""
    with_it = of.text / of.tokens.clamp(min=1) - against.text / against.tokens.clamp(min=1)
    without = below_of.text / below_of.tokens.clamp(min=1) - below_against.text / below_against.tokens.clamp(min=1)
    return _gap(with_it - without)


def with_bos(example: Example, bos: int, count: int) -> Example:
    """The row with BOS at its beginning so many times; its supervised tokens are the same (the first never is)."""
    ids, mask = example.ids, example.mask
    while len(ids) and ids[0] == bos:
        ids, mask = ids[1:], mask[1:]
    ids = np.concatenate([np.full(count, bos, dtype=np.int32), ids])
    mask = np.concatenate([np.zeros(count, dtype=bool), mask])
    mask[:1] = False  # nothing predicts the first token
    return replace(example, ids=ids, mask=mask)


@dataclass(frozen=True)
class StepZero:
    """DPO's loss before its first step, and what training made of it.

    Attributes:
        loss: mean over the pairs of -log σ(β h) with h of what the policy started from, against the reference.
        accuracy, margin: of the trained policy against the same reference; the margin β h.
        pairs: how many.
    """

    loss: float
    accuracy: float
    accuracy_error: float
    margin: float
    pairs: int


def step_zero(start: Tensor, policy: Tensor, reference: Tensor, beta: float) -> StepZero:
    """From summed log-probabilities [P, 2] of chosen and rejected (Rafailov et al. 2023, arXiv 2305.18290, eq. 7)."""

    def margins(of: Tensor) -> Tensor:
        gained = of - reference
        return beta * (gained[:, 0] - gained[:, 1])

    trained = margins(policy)
    won = (trained > 0).double()
    error = float(won.std() / math.sqrt(len(won))) if len(won) > 1 else math.inf
    return StepZero(
        float(F.softplus(-margins(start)).mean()), float(won.mean()), error, float(trained.mean()), len(won)
    )
