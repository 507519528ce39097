"""Reference log-probabilities of preference pairs: live in the same step, or computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..data.batch import Batch
from ..model.decoder import Decoder


def pair_sums(decoder: Decoder, batch: Batch, **options: Any) -> Tensor:
    """[P, 2] summed log-probabilities of chosen and rejected; see ``Decoder.token_logps`` for the options."""
    return batch.sum_by_group(decoder.token_logps(batch, **options)).view(-1, 2)


class ReferenceCache:
    """Reference sums by the pair's index, on disk under a key of everything they depend on.

    Args:
        folder: where the file lies.
        key: rows, template, base, its storage, and the adapters below (see ``cache_key``).
        pairs: how many pairs the data set has.
    """

    def __init__(self, folder: Path, key: str, pairs: int) -> None:
        self.path = folder / f"reference-{key[:16]}.safetensors"
        self.key = key
        self.pairs = pairs
        self.sums: Tensor | None = None

    def load(self) -> bool:
        """Read the file if it is there, complete and of this key."""
        try:
            sums = load_file(self.path)["sums"]
        except (FileNotFoundError, SafetensorError, KeyError):
            return False  # computed anew, and written over
        if sums.shape != (self.pairs, 2) or not bool(torch.isfinite(sums).all()):
            return False
        self.sums = sums
        return True

    def compute(
        self,
        decoder: Decoder,
        collate: Callable[[list[int]], Batch],
        over: Callable[[Callable[[list[int]], None]], None],
    ) -> None:
        """Fill the cache with the live reference's values and write it (aside, then renamed).

        Args:
            collate: makes a batch of pairs.
            over: calls its argument with groups of pairs until every pair was in one (``Guard.over``).
        """
        sums = torch.full((self.pairs, 2), float("nan"), dtype=torch.float64)

        def fill(indices: list[int]) -> None:
            batch = collate(indices).to(decoder.device)
            sums[torch.tensor(batch.indices)] = pair_sums(decoder, batch, reference=True).double().cpu()

        over(fill)
        self.sums = sums
        aside = self.path.with_suffix(".writing")
        aside.write_bytes(save({"sums": sums}, metadata={"key": self.key}))
        aside.replace(self.path)

    def __call__(self, indices: Sequence[int], device: torch.device) -> Tensor:
        """[P, 2] float64 for these pairs."""
        assert self.sums is not None
        return self.sums[torch.tensor(list(indices))].to(device)


def cache_key(**parts: Any) -> str:
    """One hash of everything that the reference depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
