"""Dropout from a counter hash: the same numbers however rows are packed, split, redone or spread over processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from .dispatch import Draw, Widths, jit, next_power_of_2, on_device, rows_dense, runs_triton, tl

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
        return replace(self, layer=layer, site=site)

    def rows(self, rows: slice) -> DropoutKey:
        """Of some of the tokens."""
        return replace(self, streams=self.streams[rows], positions=self.positions[rows])


Word = TypeVar("Word", int, Tensor)


def _mix(h: Word) -> Word:
    """A 32-bit finalizer (xor-shift-multiply, the constants of Wellons' ``lowbias32``) on integers holding uint32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D & _M32
    h = (h ^ (h >> 15)) * 0x846CA68B & _M32
    return h ^ (h >> 16)


def _prefix(key: DropoutKey) -> int:
    """The hash of all that a pass's tokens share, as uint32."""
    h = _mix((key.seed & _M32) ^ 0x9E3779B9)
    for word in (key.step, key.layer * 8 + key.site):
        h = _mix(h ^ (word & _M32))
    return h


def _signed(h: Tensor) -> Tensor:
    """uint32 held in int64 → the int32 with the same bits."""
    return torch.where(h >= 2**31, h - 2**32, h).to(torch.int32)


def _hash(key: DropoutKey, channels: int) -> Tensor:
    """Uniform over the int32: [T, channels]. It is exact integer arithmetic, so the same on every device."""
    device = key.streams.device
    row = _mix(_mix((key.streams & _M32) ^ _prefix(key)) ^ (key.positions & _M32))
    column = _mix(torch.arange(channels, device=device) ^ 0x85EBCA6B)
    # int32 products wrap around, which is what the hash wants; a logical shift is an arithmetic one, masked
    h = _signed(row)[:, None] ^ _signed(column)[None, :]
    h.mul_(0x7FEB352D)
    h.bitwise_xor_((h >> 15).bitwise_and_(0x1FFFF))
    return h.mul_(-2073254261)  # 0x846CA68B as int32


def dropout_mask(key: DropoutKey, channels: int) -> Tensor:
    """Which elements of an input of [T, channels] stay: bool [T, channels]."""
    return _hash(key, channels).bitwise_right_shift_(1) < _threshold(key)


def uniform(key: DropoutKey, channels: int) -> Tensor:
    """Uniform numbers from -1 to 1 for an input of [T, channels], float32."""
    return _hash(key, channels).float().mul_(2.0**-31)


def _threshold(key: DropoutKey) -> int:
    """The hash is uniform over the int32; where its half lies below this, an element stays."""
    return (2**31 - int(key.p * 2**32)) >> 1


def dropout_scale(key: DropoutKey, channels: int, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies an input of [T, channels] with: 0 where an element is dropped, 1 / (1 - p) elsewhere."""
    return dropout_mask(key, channels).to(dtype).mul_(1.0 / (1.0 - key.p))


def drop(x: Tensor, key: DropoutKey, out: Tensor | None = None) -> Tensor:
    """x with zeros where ``dropout_mask`` has them, not yet scaled by 1 / (1 - p).

    Args:
        x: [T, channels], rows dense, any distance apart.
        key: with layer and site set (``DropoutKey.at``).
        out: [T, channels] in x's dtype; may be x.
    Returns:
        [T, channels]: `out`, or new.
    """
    if runs_triton("dropout", x):
        return _kernel(x, key, torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out, add=False)
    dropped = x.masked_fill(~_mask(key, x.shape[1]), 0)
    return dropped if out is None else out.copy_(dropped)


def add_dropped_(target: Tensor, x: Tensor, key: DropoutKey) -> Tensor:
    """target += ``drop(x, key)``, in place; both [T, channels] in one dtype. Returns target."""
    if runs_triton("dropout", x):
        return _kernel(x, key, target, add=True)
    return target.add_(drop(x, key))


# A site's backward pass asks for the same mask two or three times in a row, and on a CPU the hash costs more than what
# applies it: the last one is kept there (3 MB for 2,048 tokens of 1,536 channels).
_last: tuple[DropoutKey, int, Tensor] | None = None


def _mask(key: DropoutKey, channels: int) -> Tensor:
    global _last
    if _last is None or _last[0] is not key or _last[1] != channels:
        mask = dropout_mask(key, channels)
        if mask.device.type != "cpu":
            return mask
        _last = (key, channels, mask)
    return _last[2]


@jit
def _mix32(h):
    """``_mix`` on uint32, whose products wrap around."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@jit
def hash_tokens(streams, positions, prefix, row):
    """The hash of these tokens, as in ``_hash``."""
    h = _mix32(tl.load(streams + row).to(tl.uint32) ^ prefix.to(tl.uint32, bitcast=True))
    return _mix32(h ^ tl.load(positions + row).to(tl.uint32))


@jit
def hash_channels(column):
    """The hash of these channels, as in ``_hash``."""
    return _mix32(column.to(tl.uint32) ^ 0x85EBCA6B)


@jit
def zero_dropped(x, of_tokens, of_channels, limit):
    """x with zeros where ``dropout_mask`` has them, word by word as there."""
    h = (of_tokens ^ of_channels) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    stays = (h.to(tl.int32, bitcast=True) >> 1) < limit
    return tl.where(stays, x, tl.zeros_like(x))


def kernel_words(key: DropoutKey) -> tuple[Tensor, Tensor, int, int]:
    """What kernels need of a key: the tokens, the prefix as int32, and the threshold."""
    prefix = _prefix(key)
    signed = prefix - 2**32 if prefix >= 2**31 else prefix
    return key.streams.contiguous(), key.positions.contiguous(), signed, _threshold(key)


@jit(do_not_specialize=["prefix", "limit"])
def _drop(
    x,
    out,
    streams,
    positions,
    prefix,
    limit,
    x_row,
    out_row,
    rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
):
    """A program takes BLOCK columns of ROWS rows, so that a column is hashed once for all of them: hashing is what bounds
    this kernel on a card whose memory is fast. The mask is never in memory."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of_channels = hash_channels(column)
    for i in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        there = column < tl.where(row < rows, WIDTH, 0)
        of_token = hash_tokens(streams, positions, prefix, tl.minimum(row, rows - 1))
        # loaded where it is dropped too: loads under a mask without pattern are not vectorized
        value = tl.load(x + row * x_row + column, mask=there, other=0.0)
        value = zero_dropped(value, of_token, of_channels, limit)
        place = out + row * out_row + column
        if ADD:
            before = tl.load(place, mask=there, other=0.0).to(tl.float32)
            value = (before + value.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(place, value, mask=there)


_ROWS = 8


def _kernel(x: Tensor, key: DropoutKey, out: Tensor, *, add: bool) -> Tensor:
    rows, width = x.shape
    assert out.shape == x.shape and (width == 1 or out.stride(1) == 1), "the result has dense rows"
    if x.numel():
        x = rows_dense(x)
        block = min(1024, next_power_of_2(width))
        with on_device(x):
            _drop[(-(-rows // _ROWS), -(-width // block))](
                x,
                out,
                *kernel_words(key),
                x.stride(0),
                out.stride(0),
                rows,
                WIDTH=width,
                BLOCK=block,
                ROWS=_ROWS,
                ADD=add,
                num_warps=max(1, block // 256),
                enable_fp_fusion=True,
            )
    return out


def sample_key(draw: Draw, rows: int, p: float) -> DropoutKey:
    streams, positions = torch.arange(rows, device=draw.device) * 2**33 + 5, torch.arange(rows, device=draw.device)
    return DropoutKey(p, 2**40 + 7, 3, streams, positions, 31, 2)


def sample(draw: Draw, widths: Widths) -> list[Tensor]:
    """What ``dispatch.check_kernels`` compares."""
    found = []
    for width, p in ((widths.hidden, 0.05), (widths.inner, 0.5), (widths.queries, 0.05)):
        x, target, key = draw(4, width), draw(4, width), sample_key(draw, 4, p)
        found += [drop(x, key), add_dropped_(target, x, key)]
    return found
