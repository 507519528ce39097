"""What a model's own log-probabilities say of it on held-out rows: the loss of conversations, and which answers it prefers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..data.batch import Batch, collate_conversations, collate_pairs
from ..data.dataset import TokenizedDataset
from ..data.packing import best_fit

MICRO_TOKENS = 2048
# told how many rows are done
Done = Callable[[int], None]


class Scorer(Protocol):
    """A model that gives the log-probability of each target of a batch (``model.decoder.Decoder``, ``plain.PlainScorer``)."""

    @property
    def device(self) -> torch.device: ...

    def token_logps(self, batch: Batch) -> Tensor:
        """[N], in the order of ``batch.target_ids``."""


@dataclass(frozen=True)
class ChatLogps:
    """Log-probabilities of what is supervised in each of n conversations, in the order of the data.

    Attributes:
        sums: [n] float64, in nats.
        tokens: [n] int64, how many tokens each has.
    """

    sums: Tensor
    tokens: Tensor

    def loss(self) -> float:
        """Nats a token, over all tokens, each counted once."""
        return float(-self.sums.sum() / self.tokens.sum())


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of the responses of P pairs, in the order of the data.

    Attributes:
        sums: [P, 2] float64, of chosen and rejected, in nats.
        tokens: [P, 2] int64, how many tokens each has.
    """

    sums: Tensor
    tokens: Tensor

    def means(self) -> Tensor:
        """[P, 2] nats a token: comparable between a short response and a long one."""
        return self.sums / self.tokens


def chat_loss(scorer: Scorer, data: TokenizedDataset) -> float:
    """Minus the mean log-probability, in nats, over all supervised tokens of the conversations, each counted once."""
    return chat_logps(scorer, data).loss()


@torch.no_grad()
def chat_logps(scorer: Scorer, data: TokenizedDataset, done: Done = lambda rows: None) -> ChatLogps:
    """The log-probability of what is supervised in each conversation."""
    sums = torch.zeros(len(data.lengths), dtype=torch.float64)
    tokens = torch.zeros(len(data.lengths), dtype=torch.int64)
    seen = 0
    for indices, batch in _batches(data, collate_conversations, scorer):
        sums[indices] = batch.sum_by_group(scorer.token_logps(batch).double()).cpu()
        tokens[indices] = batch.group_sizes.cpu()
        done(seen := seen + len(indices))
    return ChatLogps(sums, tokens)


@torch.no_grad()
def pair_logps(scorer: Scorer, data: TokenizedDataset, done: Done = lambda rows: None) -> PairLogps:
    """The log-probabilities of both responses of each pair, given the prompt they share."""
    sums = torch.zeros(len(data.lengths), 2, dtype=torch.float64)
    tokens = torch.zeros(len(data.lengths), 2, dtype=torch.int64)
    seen = 0
    for indices, batch in _batches(data, collate_pairs, scorer):
        sums[indices] = batch.sum_by_group(scorer.token_logps(batch).double()).view(-1, 2).cpu()
        tokens[indices] = batch.group_sizes.view(-1, 2).cpu()
        done(seen := seen + len(indices))
    return PairLogps(sums, tokens)


def _batches(
    data: TokenizedDataset, collate: Callable[..., Batch], scorer: Scorer
) -> Iterator[tuple[list[int], Batch]]:
    sizes = [min(int(length), MICRO_TOKENS) for length in data.lengths]
    for group in best_fit(sizes, MICRO_TOKENS):
        yield group, collate([data.examples[i] for i in group]).to(scorer.device)
