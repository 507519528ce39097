"""Codes in int8 of frozen 4-bit matrices, for the products of ``int8``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import Draw, Widths, jit, on_device, runs_triton, tl, twins
from .int8 import Int8Matrix, OutlierChannels, largest_channels, nearest
from .nf4 import block_values, dequantize, sample_weight, state_of, storage_addresses, table_on_device


def static_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The scales of a 4-bit matrix's rows and of its columns: absolute maximum / 127, float32 [out] and [in]."""
    values = _values(weight).abs_()
    return values.amax(1).mul_(1 / 127), values.amax(0).mul_(1 / 127)


def _values(weight: Tensor) -> Tensor:
    with twins():  # what is checked is the kernel in the compute dtype
        return dequantize(weight, torch.float32)


Places = Sequence[tuple[Tensor, Int8Matrix, OutlierChannels | None]]


def requantize(places: Places, dtype: torch.dtype, *, transposed: bool) -> None:
    """Write codes of 4-bit weights, and their columns of outlier channels; on CUDA in one launch for all.

    Args:
        places: (weight [out, in], where it goes, its outlier channels). codes are [out, in], outliers [out, R], or
            (`transposed`) codes are [in, out], and there are no outliers. scale is read: of ``static_scales``.
        dtype: the compute dtype.
        transposed: of all places.
    """
    run = _kernel if runs_triton("int8_weights", places[0][1].codes, dtype) else _twin
    run(places, transposed)


def _twin(places: Places, transposed: bool) -> None:
    for weight, to, outliers in places:
        inverse = torch.where(to.scale > 0, 1 / to.scale, 0)
        values = _values(weight)
        if outliers is not None:
            assert to.outliers is not None
            to.outliers.copy_(values[:, outliers.channels])
            values.index_fill_(1, outliers.channels, 0)
        codes = values.mul_(inverse if transposed else inverse[:, None]).round_()
        to.codes.copy_(codes.T if transposed else codes)


@jit(do_not_specialize=["count"])
def _requantize(
    table,
    like,
    count,
    TRANSPOSED: tl.constexpr,
    NESTED: tl.constexpr,
    HALF: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program takes ROWS rows of one block of 2 · HALF columns, of one of `count` weights.

    The table has 14 numbers a weight: its first program, rows, blocks a row, and outlier channels, and the addresses of its
    codes, scales, slots, outliers (a pointer like `like`) and of its tensors.
    """
    program = tl.program_id(0)
    which = 0
    for i in range(1, count):
        which += (program >= tl.load(table + 14 * i)).to(tl.int32)
    entry = table + 14 * which
    rows, blocks = tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    codes = tl.multiple_of(tl.load(entry + 4).to(tl.pointer_type(tl.int8)), 16)
    scale = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
    program -= tl.load(entry).to(tl.int32)
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    block = row * blocks + program % blocks
    column = program % blocks * (2 * HALF) + tl.arange(0, 2 * HALF)
    filled = row < rows
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    value = block_values(entry + 8, block, filled, byte, filled[:, None], NESTED, NESTED_BLOCK)
    if TRANSPOSED:
        s = tl.load(scale + column)
        code = nearest(value * tl.where(s > 0, tl.div_rn(1.0, s), 0.0)[None, :])
        tl.store(codes + column[:, None] * rows + row[None, :], tl.trans(code), mask=filled[None, :])
    else:
        s = tl.load(scale + row, mask=filled, other=0.0)
        code = nearest(value * tl.where(s > 0, tl.div_rn(1.0, s), 0.0)[:, None])
        slot = tl.load(tl.load(entry + 6).to(tl.pointer_type(tl.int16)) + column).to(tl.int32)
        outliers = tl.load(entry + 7).to(like.dtype)
        place = row[:, None] * tl.load(entry + 3).to(tl.int32) + slot[None, :]
        outlier = filled[:, None] & (slot >= 0)[None, :]
        tl.store(outliers + place, value.to(like.dtype.element_ty), mask=outlier)
        place = row[:, None] * (blocks * 2 * HALF) + column[None, :]
        tl.store(codes + place, tl.where(outlier, 0, code).to(tl.int8), mask=filled[:, None])


_ROWS = 64


def _kernel(places: Places, transposed: bool) -> None:
    first, device = state_of(places[0][0]), places[0][1].codes.device
    numbers: list[int] = []
    programs, like = 0, places[0][1].codes
    for weight, to, outliers in places:
        state = state_of(weight)
        (rows, width), addresses = state.shape, (0, 0)
        assert width % state.blocksize == 0 and state.blocksize == first.blocksize and state.nested == first.nested
        assert to.codes.is_contiguous() and to.codes.shape == ((width, rows) if transposed else (rows, width))
        if not transposed:
            assert outliers is not None and to.outliers is not None and to.outliers.is_contiguous()
            like, addresses = to.outliers, (outliers.slots.data_ptr(), to.outliers.data_ptr())
        blocks = width // state.blocksize
        count = 0 if outliers is None else len(outliers.channels)
        numbers += [programs, rows, blocks, count, to.codes.data_ptr(), to.scale.data_ptr(), *addresses]
        numbers += storage_addresses(weight)
        programs += -(-rows // _ROWS) * blocks
    table, nested = table_on_device(tuple(numbers), device), first.state2.blocksize if first.nested else 1
    options = {"TRANSPOSED": transposed, "NESTED": first.nested, "HALF": first.blocksize // 2, "NESTED_BLOCK": nested}
    with on_device(like):
        _requantize[(programs,)](table, like, len(places), **options, ROWS=_ROWS, num_warps=8, enable_fp_fusion=False)


def sample(draw: Draw, widths: Widths) -> list[Tensor]:
    """What ``dispatch.check_kernels`` compares."""
    if not widths.int8:
        return []
    height, found = 256, []
    for width in (-(-width // 64) * 64 for width in (widths.hidden, widths.inner)):  # whole blocks
        weight = sample_weight(draw(height, width))
        scales, outliers = static_scales(weight), largest_channels(draw(width).abs())
        codes = torch.zeros(2, height * width, dtype=torch.int8, device=draw.device)
        kept = torch.zeros_like(draw(height, len(outliers.channels)))
        forward = Int8Matrix(codes[0].view(height, width), scales[0], kept)
        backward = Int8Matrix(codes[1].view(width, height), scales[1])
        requantize([(weight, forward, outliers)], kept.dtype, transposed=False)
        requantize([(weight, backward, None)], kept.dtype, transposed=True)
        found += [codes, kept]
    return found
