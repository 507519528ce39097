"""What a model's own log-probabilities say of it on held-out rows: the loss of conversations, and which answers it prefers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batch import Batch, collate_conversations, collate_pairs
from ..data.packing import best_fit
from ..data.prepare import Prepared
from ..model.decoder import Decoder

MICRO_TOKENS = 2048


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


@torch.no_grad()
def chat_loss(decoder: Decoder, data: Prepared) -> float:
    """Minus the mean log-probability, in nats, over all supervised tokens of the conversations, each counted once."""
    total, targets = 0.0, 0
    for _, batch in _batches(data, collate_conversations, decoder):
        logps = decoder.token_logps(batch)
        total, targets = total - logps.double().sum().item(), targets + logps.numel()
    return total / targets


@torch.no_grad()
def pair_logps(decoder: Decoder, data: Prepared) -> PairLogps:
    """The log-probabilities of both responses of each pair, given the prompt they share."""
    sums = torch.zeros(len(data.lengths), 2, dtype=torch.float64)
    tokens = torch.zeros(len(data.lengths), 2, dtype=torch.int64)
    for indices, batch in _batches(data, collate_pairs, decoder):
        sums[indices] = batch.sum_by_group(decoder.token_logps(batch).double()).view(-1, 2).cpu()
        tokens[indices] = batch.group_sizes.view(-1, 2).cpu()
    return PairLogps(sums, tokens)


def _batches(data: Prepared, collate: Callable[..., Batch], decoder: Decoder) -> Iterator[tuple[list[int], Batch]]:
    sizes = [min(int(length), MICRO_TOKENS) for length in data.lengths]
    for group in best_fit(sizes, MICRO_TOKENS):
        yield group, collate([data.examples[i] for i in group]).to(decoder.device)
