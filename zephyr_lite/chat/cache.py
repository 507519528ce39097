"""The keys and values of conversations that go on: what a next prompt has in common with them is not computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True)
class Chunk:
    """What is to be computed, all rows aligned on the right.

    Attributes:
        tokens, positions: [rows, M] int64; where a row is shorter than M its beginning is padding.
        mask: [rows, K + M] int64 over the kept slots and these; 0 is padding.
        reused: how many tokens of each row are not computed again.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    reused: list[int]


class RowCache:
    """A key-value cache of a few rows, each of which may go on from another place.

    A row's slots are contiguous, so that a sliding window counts in slots what it means in positions. Layers are kept
    whole even where the model has such a window: what slid out of it may be wanted again after an undo.

    Attributes:
        past: what the model reads and appends to.
        ids: what the slots of each row hold, from ``starts`` on.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.forget()

    def forget(self) -> None:
        self.past = DynamicCache()
        self.ids: list[list[int]] = [[] for _ in range(self._rows)]
        self.starts = [0] * self._rows

    def begin(self, prompts: Sequence[Sequence[int]], device: torch.device, pad: int) -> Chunk:
        """Keep what the prompts have in common with the rows, and say what is left to compute.

        At least one token of each row is, for its logits; and where rows differ in how much is new, the chunk is as long
        as the longest needs, so that a row with less new in it computes some of its old tokens again.
        """
        totals = [len(ids) for ids in prompts]
        common = [min(_common(old, new), len(new) - 1) for old, new in zip(self.ids, prompts)]
        width = max(total - same for total, same in zip(totals, common))
        kept = [max(0, total - width) for total in totals]
        self._keep(kept)
        most = max(kept)
        tokens = torch.full((self._rows, width), pad, dtype=torch.int64)
        positions = torch.zeros_like(tokens)
        mask = torch.zeros((self._rows, most + width), dtype=torch.int64)
        for row, (ids, have) in enumerate(zip(prompts, kept)):
            new = list(ids[have:])
            tokens[row, width - len(new) :] = torch.tensor(new)
            positions[row, width - len(new) :] = torch.arange(have, len(ids))
            mask[row, most + width - len(ids) :] = 1
            self.starts[row] = most + width - len(ids)
            self.ids[row] = list(ids[:have])
        return Chunk(tokens.to(device), positions.to(device), mask.to(device), kept)

    def _keep(self, kept: list[int]) -> None:
        """The first so many slots of each row, moved to the right end."""
        most = max(kept)
        if most == 0:
            self.past = DynamicCache()
            return
        places = torch.zeros((self._rows, most), dtype=torch.int64)  # of padding: any slot, it is masked
        for row, (count, start) in enumerate(zip(kept, self.starts)):
            places[row, most - count :] = torch.arange(start, start + count)
        for layer in self.past.layers:
            if layer.is_initialized:
                where = places.to(layer.keys.device)
                rows = torch.arange(self._rows, device=where.device)[:, None]
                for part in ("keys", "values"):
                    held = getattr(layer, part).transpose(1, 2)  # [rows, slots, heads, width of a head]
                    setattr(layer, part, held[rows, where].transpose(1, 2).contiguous())


def _common(old: Sequence[int], new: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for place, (a, b) in enumerate(zip(old, new)):
        if a != b:
            return place
    return min(len(old), len(new))
