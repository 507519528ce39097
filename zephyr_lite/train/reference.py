"""Reference log-probabilities of preference pairs: live in the same step, or computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.batch import Batch, collate_pairs
from ..data.dataset import TokenizedDataset
from ..io.safetensors import tensor_bytes, write_stream
from ..model.decoder import Decoder
from .distributed import world
from .oom import OomRetry

logger = logging.getLogger(__name__)

# the file is written so often
SAVE_SECONDS = 60.0


def pair_sums(decoder: Decoder, batch: Batch, **options: Any) -> Tensor:
    """[P, 2] summed log-probabilities of chosen and rejected; see ``Decoder.token_logps`` for the options."""
    return batch.sum_by_group(decoder.token_logps(batch, **options)).view(-1, 2)


class ReferenceCache:
    """Reference log-probabilities of all pairs, kept in a file.

    The file holds ``sums`` (float64 [pairs, 2], NaN where not computed yet), the key, and the hash of both.

    Args:
        folder: the file's folder.
        pairs: the number of pairs.
        parts: everything that the reference depends on: rows, template, base, its storage, and the adapters below.
    """

    def __init__(self, folder: Path, pairs: int, **parts: Any) -> None:
        self.key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
        self.path = folder / f"reference-{self.key[:16]}.safetensors"
        self.pairs = pairs
        self.sums = torch.full((pairs, 2), float("nan"), dtype=torch.float64)

    @property
    def missing(self) -> int:
        """Pairs that have no sums yet."""
        return int(np.isnan(self.sums.numpy()).any(axis=1).sum())

    def load(self) -> bool:
        """Read the file, in one process for all; returns whether every pair has its sums."""
        self.sums = world().broadcast(self._read)
        return not self.missing

    def _read(self) -> Tensor:
        if not self.path.exists():
            return self.sums
        try:
            with safe_open(self.path, "pt") as file:
                metadata, sums = file.metadata(), file.get_tensor("sums")
            if metadata == self._metadata(sums) and sums.shape == self.sums.shape:
                return sums
        except (OSError, SafetensorError) as error:
            logger.warning(f"{self.path}: {error}")
        logger.warning(f"{self.path}: is damaged, or of other pairs; it is computed again")
        return self.sums

    @torch.no_grad()
    def add(self, decoder: Decoder, data: TokenizedDataset, indices: Sequence[int]) -> None:
        """Compute the sums of these pairs."""
        batch = collate_pairs([data.examples[i] for i in indices]).to(decoder.device)
        self.sums[torch.tensor(batch.indices)] = pair_sums(decoder, batch, reference=True).double().cpu()

    def compute(self, decoder: Decoder, data: TokenizedDataset, oom: OomRetry) -> None:
        """Fill the cache with the live reference's values. Known groups are not computed again; the file is written every
        minute and when the work is interrupted."""
        main = world().is_main_process

        def compute(indices: list[int]) -> None:
            if self.sums[indices].isnan().any():
                self.add(decoder, data, indices)

        saved = time.monotonic()
        try:
            for _ in oom.groups(data, compute):  # split alike at every start, so that sums round alike
                if main and time.monotonic() - saved >= SAVE_SECONDS:
                    self._write()
                    saved = time.monotonic()
            for other in world().all_gather(self.sums):
                self.sums = torch.where(self.sums.isnan(), other, self.sums)
        finally:
            if main:
                self._write()

    def _write(self) -> None:
        def write(name: str, out: BinaryIO) -> None:
            out.write(tensor_bytes(self.sums))

        write_stream(self.path, {"sums": ("F64", (self.pairs, 2))}, write, self._metadata(self.sums))

    def _metadata(self, sums: Tensor) -> dict[str, str]:
        return {"key": self.key, "sha256": hashlib.sha256(self.key.encode() + tensor_bytes(sums)).hexdigest()}

    def __call__(self, indices: Sequence[int], device: torch.device) -> Tensor:
        """[P, 2] float64 for these pairs."""
        return self.sums[torch.tensor(list(indices))].to(device)
