"""Reference log-probabilities of preference pairs: live in the same step, or computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.batch import Batch
from ..io.safetensors import tensor_bytes, write_stream
from ..model.decoder import Decoder
from .distributed import PeerEnded, world

logger = logging.getLogger(__name__)

# the file is written so often
SAVE_SECONDS = 60.0


def pair_sums(decoder: Decoder, batch: Batch, **options: Any) -> Tensor:
    """[P, 2] summed log-probabilities of chosen and rejected; see ``Decoder.token_logps`` for the options."""
    return batch.sum_by_group(decoder.token_logps(batch, **options)).view(-1, 2)


class ReferenceCache:
    """Reference log-probabilities of all pairs, kept in a file.

    The file holds ``sums`` (float64 [pairs, 2], NaN where not computed yet), the key, which tells a foreign file, and the hash
    of both.

    Args:
        folder: the file's folder.
        key: hash of rows, template, base, its storage, and the adapters below (see ``cache_key``).
        pairs: the number of pairs.
    """

    def __init__(self, folder: Path, key: str, pairs: int) -> None:
        self.path = folder / f"reference-{key[:16]}.safetensors"
        self.key = key
        self.pairs = pairs
        self.sums = torch.full((pairs, 2), float("nan"), dtype=torch.float64)

    @property
    def missing(self) -> int:
        """Pairs that have no sums yet."""
        return int((~self._known()).sum())

    def load(self) -> bool:
        """Read the file, in one process for all; returns whether every pair has its sums.

        Args:
        """
        self.sums = world().lead(lambda: self._read())
        return not self.missing

    def _read(self) -> Tensor:
        if not self.path.exists():
            return self.sums
        try:
            with safe_open(self.path, "pt") as file:
                metadata, sums = file.metadata() or {}, file.get_tensor("sums")
            wrong = self._fault(metadata, sums)
        except (OSError, SafetensorError) as error:
            wrong = f"cannot be read ({error})"
        if wrong is None:
            return sums
        logger.info(f"{self.path}: {wrong}; it is computed again")
        return self.sums

    def _fault(self, metadata: Mapping[str, str], sums: Tensor) -> str | None:
        if (sums.dtype, tuple(sums.shape)) != (torch.float64, (self.pairs, 2)):
            return f"does not hold the sums of {self.pairs:,} pairs"
        if metadata.get("key") != self.key:
            return "belongs to other rows, another base or other adapters"
        if metadata.get("sha256") != self._sha256(sums):
            return "has another hash than was written"
        return None

    def compute(
        self,
        decoder: Decoder,
        collate: Callable[[list[int]], Batch],
        groups: Iterable[tuple[AbstractContextManager[Any], list[int]]],
    ) -> None:
        """Fill the cache with the live reference's values. Known groups are not computed again; the file is written every
        minute and when the work is interrupted.

        Args:
            collate: makes a batch of pairs.
            groups: all pairs (see ``OomRetry.groups``), split alike at every start, so that sums round alike.

        Raises:
            OSError: the file cannot be written.
        """
        here = world()

        def fill() -> None:
            saved = time.monotonic()
            for attempt, indices in groups:
                with attempt:
                    if self._known()[indices].all():
                        continue
                    batch = collate(indices).to(decoder.device)
                    self.sums[torch.tensor(batch.indices)] = pair_sums(decoder, batch, reference=True).double().cpu()
                if here.writes and time.monotonic() - saved >= SAVE_SECONDS:
                    self._write()
                    saved = time.monotonic()

        try:
            here.together(fill)
        except BaseException:
            with suppress(PeerEnded, KeyboardInterrupt):
                self._collect()
            if here.writes:
                with suppress(OSError):
                    self._write()
            raise
        self._collect()
        here.together(self._write if here.writes else lambda: None)

    def _collect(self) -> None:
        """Exchange the shares that each process has computed."""
        if world().size > 1:
            for other in world().gather(self.sums):
                self.sums = torch.where(self.sums.isnan(), other, self.sums)

    def _write(self) -> None:
        metadata = {"key": self.key, "sha256": self._sha256(self.sums)}

        def write(name: str, out: BinaryIO) -> None:
            out.write(tensor_bytes(self.sums))

        write_stream(self.path, {"sums": ("F64", (self.pairs, 2))}, write, metadata)

    def _sha256(self, sums: Tensor) -> str:
        return hashlib.sha256(self.key.encode() + tensor_bytes(sums)).hexdigest()

    def _known(self) -> np.ndarray:
        return np.isfinite(self.sums.numpy()).all(axis=1)

    def __call__(self, indices: Sequence[int], device: torch.device) -> Tensor:
        """[P, 2] float64 for these pairs."""
        return self.sums[torch.tensor(list(indices))].to(device)


def cache_key(**parts: Any) -> str:
    """The hash of everything that the reference depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
