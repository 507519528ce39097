"""Measurements of an adapter: log-probabilities of conversations and pairs under several assumptions.

Every question is a difference of differences, row by row: the effect of a doubled BOS (or of another template) on the model with
the adapter, minus its effect on the model below it. A base may prefer one text to another; training shows in what the adapter
changed.
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
MAX_TOKENS = 1024  # of a row


@dataclass(frozen=True)
class RowSums:
    """Log-probabilities of conversations' answers, in nats.

    Attributes:
        text: [R] float64, sums over the answers' tokens without end tokens.
        tokens: [R] float64, their number.
        ends: [E] float64, of every end token.
    """

    text: Tensor
    tokens: Tensor
    ends: Tensor

    @property
    def loss(self) -> float:
        """Nats a token of the answers' text."""
        return float(-self.text.sum() / self.tokens.sum())

    @property
    def means(self) -> Tensor:
        """[R] float64, of each row's answers."""
        return self.text / self.tokens.clamp(min=1)

    @property
    def end_probability(self) -> float | None:
        """The median probability of the end tokens; None if no answer ends within ``MAX_TOKENS``."""
        return math.exp(float(self.ends.median())) if len(self.ends) else None


def examples_of(template: ChatTemplate, rows: Sequence[Messages]) -> list[Example]:
    """The rows in a template's format.

    Raises:
        UserError: none of them can be rendered.
    """
    found, why = [], "no answers in them"
    for place, messages in enumerate(rows):
        try:
            ids, mask = template.encode(messages)
        except RowError as error:
            why = str(error)
            continue
        if mask[:MAX_TOKENS].any():
            found.append(Example(ids[:MAX_TOKENS], mask[:MAX_TOKENS], "", place))
    if not found:
        raise UserError(f"none of the {len(rows)} conversations can be rendered: {why}.")
    return found


@torch.no_grad()
def row_sums(decoder: Decoder, examples: Sequence[Example], end_ids: Sequence[int]) -> RowSums:
    """Sums of each row; end tokens are separate, as templates have different ones."""
    text = torch.zeros(len(examples), dtype=torch.float64)
    tokens = torch.zeros(len(examples), dtype=torch.float64)
    ends: list[Tensor] = []
    for group in best_fit([min(len(e.ids), MICRO_TOKENS) for e in examples], MICRO_TOKENS):
        batch = collate_conversations([examples[i] for i in group]).to(decoder.device)
        targets = [torch.from_numpy(examples[i].ids[examples[i].mask].astype(np.int64)) for i in group]
        logps = decoder.token_logps(batch).double().cpu().split([len(each) for each in targets])
        for row, own, ids in zip(group, logps, targets):
            is_end = torch.isin(ids, torch.tensor(list(end_ids)))
            text[row], tokens[row] = own[~is_end].sum(), float((~is_end).sum())
            ends.append(own[is_end])
    return RowSums(text, tokens, torch.cat(ends))


@dataclass(frozen=True)
class Gap:
    """A mean difference over rows in nats a token, and its standard error (infinite for a single row)."""

    mean: float
    error: float

    @property
    def clear(self) -> bool:
        """Whether it is above zero by three standard errors and by more than rounding."""
        return self.mean > max(3 * self.error, 0.005)

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f} nats a token"


def gap(of: RowSums, against: RowSums, below: tuple[RowSums, RowSums] | None = None) -> Gap:
    """By how much the answers' text costs less in ``of`` than in ``against``.

    Args:
        below: the same two without the adapter; their difference is subtracted.
    """
    differences = of.means - against.means
    if below is not None:
        differences = differences - (below[0].means - below[1].means)
    n = len(differences)
    return Gap(float(differences.mean()), float(differences.std() / math.sqrt(n)) if n > 1 else math.inf)


def with_bos(example: Example, bos: int, count: int) -> Example:
    """The row with this many BOS tokens at its start; the first token is never supervised."""
    ids, mask = example.ids, example.mask
    while len(ids) and ids[0] == bos:
        ids, mask = ids[1:], mask[1:]
    ids = np.concatenate([np.full(count, bos, dtype=np.int32), ids])
    mask = np.concatenate([np.zeros(count, dtype=bool), mask])
    mask[:1] = False
    return replace(example, ids=ids, mask=mask)


@dataclass(frozen=True)
class StepZero:
    """DPO's loss before its first step, and the trained policy's rewards.

    Attributes:
        loss: mean over the pairs of -log σ(β h), with h of the policy's start against the reference.
        accuracy, margin: of the trained policy against the same reference; the margin is β h.
        pairs: their number.
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
    loss = float(F.softplus(-margins(start)).mean())
    return StepZero(loss, float(won.mean()), error, float(trained.mean()), len(won))
