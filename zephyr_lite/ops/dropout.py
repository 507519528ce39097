"""Dropout from a counter hash: the same numbers however rows are packed, split, redone or spread over processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_M32 = 0xFFFFFFFF


@dataclass(frozen=True)
class DropoutKey:
    """What a forward pass's dropout depends on.

    Attributes:
        p: probability that an element is dropped.
        seed: the run's seed.
        step: the optimizer step.
        streams, positions: [T] int64; together they name a token (see ``data.batch.Batch``).
        layer, site: the decoder layer, and which of its inputs.
    """

    p: float
    seed: int
    step: int
    streams: Tensor
    positions: Tensor
    layer: int = 0
    site: int = 0

    def at(self, layer: int, site: int) -> DropoutKey:
        return DropoutKey(self.p, self.seed, self.step, self.streams, self.positions, layer, site)


def _mix(h: Tensor) -> Tensor:
    """A 32-bit finalizer (xor-shift-multiply, the constants of Wellons' ``lowbias32``) on int64 holding uint32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D & _M32
    h = (h ^ (h >> 15)) * 0x846CA68B & _M32
    return h ^ (h >> 16)


def _signed(h: Tensor) -> Tensor:
    """uint32 held in int64 → the int32 with the same bits."""
    return torch.where(h >= 2**31, h - 2**32, h).to(torch.int32)


def dropout_scale(key: DropoutKey, channels: int, dtype: torch.dtype) -> Tensor:
    """What to multiply an input of [T, channels] with: 0 where an element is dropped, 1 / (1 - p) elsewhere.

    The hash is exact integer arithmetic, so the pattern is the same on every device and in every dtype.
    """
    device = key.streams.device
    row = _mix(torch.tensor([key.seed & _M32], device=device) ^ 0x9E3779B9)
    for word in (key.step, key.layer * 8 + key.site):
        row = _mix(row ^ (word & _M32))
    row = _mix(row ^ (key.streams & _M32))
    row = _mix(row ^ (key.positions & _M32))
    column = _mix(torch.arange(channels, device=device) ^ 0x85EBCA6B)
    # int32 products wrap around, which is what the hash wants; a logical shift is an arithmetic one, masked
    h = _signed(row)[:, None] ^ _signed(column)[None, :]
    h = h * 0x7FEB352D
    h ^= (h >> 15) & 0x1FFFF
    h *= -2073254261  # 0x846CA68B as int32
    threshold = int(key.p * 2**32) - 2**31
    return (h >= threshold).to(dtype).mul_(1.0 / (1.0 - key.p))
