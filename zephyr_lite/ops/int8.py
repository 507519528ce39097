"""Products with frozen matrices in 8 bits, but for outlier channels (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339).

    y = s_x s_w (codes_x · codes_wᵀ) + outliers_x · outliers_wᵀ + left · rightᵀ

Codes are integers from -127 to 127, with a scale a row; their sums are exact. The channels of the input whose values are
largest are left out of the codes and multiplied in 16 bits, as a low-rank product is (adapters: z and s B). Everything is
added in float32 and rounded once. The gradient of the input is the same product with the transposed matrix, which has codes
and scales of its own, and no outliers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import Draw, Widths, jit, next_power_of_2, on_device, rows_dense, runs_triton, tl, truncates


class Int8Matrix(NamedTuple):
    """A matrix of activations or weights in int8.

    Attributes:
        codes: int8 [rows, K], contiguous; 0 in outlier channels.
        scale: float32 [rows].
        outliers: [rows, R] in the compute dtype, the columns of the outlier channels; None: there are none.
    """

    codes: Tensor
    scale: Tensor
    outliers: Tensor | None = None


class OutlierChannels(NamedTuple):
    """Channels that stay in 16 bits.

    Attributes:
        channels: int64 [R], ascending.
        slots: int16 [K], each channel's place among them; -1: not one of them.
    """

    channels: Tensor
    slots: Tensor


def outlier_count(width: int) -> int:
    """How many of an input's channels stay in 16 bits: 1/64, rounded up to a multiple of 16."""
    return -(-width // 1024) * 16


def largest_channels(maxima: Tensor) -> OutlierChannels:
    """The ``outlier_count`` channels with the largest values.

    Args:
        maxima: [K], the largest absolute value of each channel.
    """
    count = outlier_count(len(maxima))
    channels = maxima.argsort(descending=True, stable=True)[:count].sort().values
    slots = torch.full(maxima.shape, -1, dtype=torch.int16, device=maxima.device)
    slots[channels] = torch.arange(count, dtype=torch.int16, device=maxima.device)
    return OutlierChannels(channels, slots)


def quantize_rows(x: Tensor, outliers: OutlierChannels | None = None) -> Int8Matrix:
    """x in int8, each row with its own scale: absolute maximum of the channels that are not outliers, / 127.

    A row of zeros has the scale 0; one with an infinity or a NaN has a scale that is not finite.

    Args:
        x: [T, K], rows dense, any distance apart.
    """
    if not runs_triton("int8", x):
        wide, kept = x.float(), None
        if outliers is not None:
            kept = x[:, outliers.channels]
            wide = wide.index_fill(1, outliers.channels, 0)
        top = wide.abs().amax(1)
        top = torch.where(top < 1e-30, 0, top)  # its reciprocal could not be computed
        inverse = torch.where(top == 0, 0, 1 / top * 127)
        codes = (wide * inverse[:, None]).round_().to(torch.int8)
        return Int8Matrix(codes, top * (1 / 127), kept)
    x = rows_dense(x)
    rows, width = x.shape
    codes = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    kept = None if outliers is None else torch.empty(rows, len(outliers.channels), dtype=x.dtype, device=x.device)
    if rows:
        tensors = (x, *((None, None) if outliers is None else outliers), codes, scale, kept)
        block, count = next_power_of_2(width), 0 if kept is None else kept.shape[1]
        options = {"K": width, "R": count, "BLOCK": block, "KEPT": next_power_of_2(count)}
        warps = min(32, max(1, block // 512))
        with on_device(x):
            _quantize[(rows,)](*tensors, x.stride(0), **options, num_warps=warps, enable_fp_fusion=False)
    return Int8Matrix(codes, scale, kept)


def int8_mm(
    x: Int8Matrix,
    weight: Int8Matrix,
    out: Tensor,
    low_rank: tuple[Tensor, Tensor] | None = None,
    *,
    add: bool = False,
) -> Tensor:
    """y = x · weightᵀ + left · rightᵀ.

    Args:
        x: [T, K].
        weight: [N, K], of the same outlier channels.
        out: [T, N] in the compute dtype, rows dense, any distance apart: where y is written.
        low_rank: left [T, R], rows dense, and right [N, R] with any strides, in the compute dtype.
        add: add to what `out` holds.
    Returns:
        `out`.
    """
    (rows, inner), (columns, width) = x.codes.shape, weight.codes.shape
    # the largest sum of products is exact in int32
    assert inner == width and inner % 16 == 0 and inner * 127**2 < 2**31 and out.shape == (rows, columns)
    assert (x.outliers is None) == (weight.outliers is None)
    if not runs_triton("int8", out):
        return _twin_mm(x, weight, out, low_rank, add)
    nothing = out[:0, :0]
    kept = (nothing, nothing) if x.outliers is None or weight.outliers is None else (x.outliers, weight.outliers)
    left, right = (nothing, nothing) if low_rank is None else low_rank
    assert all(t.is_contiguous() for t in (x.codes, weight.codes, *kept)) and out.stride(1) == left.stride(1) == 1
    assert kept[0].shape[1] == kept[1].shape[1] and left.shape[1] == right.shape[1]
    bm, bn, bk, stages = _TILES.get(_major(out.device), _TILE)
    if rows:
        tensors = (x.codes, weight.codes, x.scale, weight.scale, *kept, left, right, out)
        sizes = (rows, columns, inner, kept[0].shape[1], left.shape[1])
        strides = (left.stride(0), *right.stride(), out.stride(0))
        options = {"ADD": add, "EVEN": inner % bk == 0, "WIDEN": truncates(out.device, out.dtype)}
        tile = {"BM": bm, "BN": bn, "BK": bk, "num_stages": stages, "num_warps": 8}
        with on_device(out):
            _mm[(-(-rows // bm) * -(-columns // bn),)](*tensors, *sizes, *strides, **options, **tile)
    return out


def _twin_mm(
    x: Int8Matrix, weight: Int8Matrix, out: Tensor, low_rank: tuple[Tensor, Tensor] | None, add: bool
) -> Tensor:
    y = torch.mul(_exact_sums(x.codes, weight.codes), x.scale[:, None]).mul_(weight.scale)
    if x.outliers is not None and weight.outliers is not None:
        y.addmm_(x.outliers.float(), weight.outliers.float().T)
    if low_rank is not None:
        y.addmm_(low_rank[0].float(), low_rank[1].float().T)
    return out.copy_(y.add_(out) if add else y)


def _exact_sums(a: Tensor, b: Tensor) -> Tensor:
    """a · bᵀ in int32. On CUDA torch wants more than 16 rows."""
    padded = torch.nn.functional.pad(a, (0, 0, 0, 32 - len(a))) if a.is_cuda and len(a) <= 16 else a
    return torch._int_mm(padded, b.T)[: len(a)]


@jit
def nearest(value):
    """The nearest integer, half to even, as int8: adding 1.5 · 2²³ rounds, and leaves the integer in the lowest bits."""
    return (value + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@jit
def _quantize(
    x,
    channels,
    slots,
    codes,
    scale,
    kept,
    x_row,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
):
    """A program takes a row, which stays in registers. R: outlier channels; BLOCK and KEPT: K and R filled up."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    column = tl.arange(0, BLOCK)
    there = column < K
    wide = tl.load(x + column, mask=there, other=0.0).to(tl.float32)
    if R:
        # read again, out of the cache: to scatter what is in registers would take a detour through shared memory
        place = tl.arange(0, KEPT)
        chosen = tl.load(x + tl.load(channels + place, mask=place < R, other=0))
        tl.store(kept + row * R + place, chosen, mask=place < R)
        wide = tl.where(tl.load(slots + column, mask=there, other=-1) >= 0, 0.0, wide)
    # as integers, absolute values are ordered as they are, and a NaN is the largest
    top = tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
    top = tl.where(top < 1e-30, 0.0, top)
    tl.store(scale + row, top * (1 / 127))
    code = nearest(wide * tl.where(top == 0, 0.0, tl.div_rn(1.0, top) * 127.0))
    tl.store(codes + row * K + column, code, mask=there)


@jit
def _add_product(total, left, right, left_row, right_row, right_column, inner, m, n, WIDEN: tl.constexpr):
    """total + left[m] · right[n]ᵀ, of `inner` values in 16 bits. WIDEN: the interpreter knows no bfloat16 here."""
    k = tl.arange(0, 16)
    left += m[:, None] * left_row + k[None, :]
    right += n[:, None] * right_row + k[None, :] * right_column
    for start in range(0, inner, 16):
        there = (k < inner - start)[None, :]
        a, b = tl.load(left, mask=there, other=0.0), tl.load(right, mask=there, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        left += 16
        right += 16 * right_column
    return total


@jit(do_not_specialize=["rows"])
def _mm(
    x,
    w,
    x_scale,
    w_scale,
    x_kept,
    w_kept,
    left,
    right,
    out,
    rows,
    columns,
    inner,
    kept,
    rank,
    left_row,
    right_row,
    right_column,
    out_row,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A program takes BM x BN of y; eight rows of programs follow each other by columns, so that they find w in the cache.
    EVEN: rows are whole BK."""
    program, wide = tl.program_id(0), tl.cdiv(columns, BN)
    first = program // (8 * wide) * 8
    size = tl.minimum(tl.cdiv(rows, BM) - first, 8)
    program %= 8 * wide
    top, start = ((first + program % size) * BM).to(tl.int64), (program // size * BN).to(tl.int64)
    # beyond the end the last row is read again, without masks, and not stored
    row, column, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    m = tl.minimum(row, (rows - top - 1).to(tl.int32))
    n = tl.minimum(column, (columns - start - 1).to(tl.int32))
    a = x + top * inner + (m[:, None] * inner + k[None, :])
    b = w + start * inner + (n[:, None] * inner + k[None, :])
    sums = tl.zeros((BM, BN), tl.int32)
    for done in range(0, inner, BK):
        if EVEN:
            left_codes, right_codes = tl.load(a), tl.load(b)
        else:
            there = (k < inner - done)[None, :]
            left_codes, right_codes = tl.load(a, mask=there, other=0), tl.load(b, mask=there, other=0)
        sums = tl.dot(left_codes, tl.trans(right_codes), sums)
        a += BK
        b += BK
    y = sums.to(tl.float32) * tl.load(x_scale + top + m)[:, None] * tl.load(w_scale + start + n)[None, :]
    y = _add_product(y, x_kept + top * kept, w_kept + start * kept, kept, kept, 1, kept, m, n, WIDEN)
    left += top * left_row
    right += start * right_row
    y = _add_product(y, left, right, left_row, right_row, right_column, rank, m, n, WIDEN)
    place = out + top * out_row + start + (row[:, None] * out_row + column[None, :])
    there = (row < rows - top)[:, None] & (column < columns - start)[None, :]
    if ADD:
        y += tl.load(place, mask=there, other=0.0).to(tl.float32)
    tl.store(place, y.to(out.dtype.element_ty), mask=there)


# triton compiles no products for the matrix units of older cards
CAPABILITY = (8, 0)
# major compute capability → BM, BN, BK, stages: what needs no spills and fits the shared memory; 0: the interpreter
_TILES = {0: (16, 64, 64, 1), 9: (128, 256, 128, 3), 10: (128, 128, 128, 3), 12: (256, 128, 64, 3)}
_TILE = (128, 256, 64, 3)


def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def sample(draw: Draw, widths: Widths) -> list[Tensor]:
    """What ``dispatch.check_kernels`` compares: products as the layer launches them."""
    if not widths.int8:
        return []
    rows, height, rank, found = 3, 256, 16, []
    for width in (-(-width // 64) * 64 for width in (widths.hidden, widths.inner)):
        x, grad = draw(rows, width), draw(rows, height)
        outliers = largest_channels(x.abs().amax(0))
        x8, grad8 = quantize_rows(x, outliers), quantize_rows(grad)
        forward = quantize_rows(draw(height, width))._replace(outliers=draw(height, len(outliers.channels)))
        backward = quantize_rows(draw(width, height))
        found += [*x8, grad8.codes, grad8.scale]
        for left, right, low_rank, add in (
            (x8, forward, (draw(rows, rank), draw(height, rank)), False),
            (x8, forward, (draw(rows, rank), draw(height, rank)), True),
            (grad8, backward, (draw(rows, rank), draw(rank, width).T), False),
            (grad8, backward, None, True),
        ):
            found.append(int8_mm(left, right, draw(rows, len(right.codes)), low_rank, add=add))
    return found
