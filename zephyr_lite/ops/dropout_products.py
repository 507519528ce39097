"""Low-rank products of an input under dropout, and their gradients.

z = drop(x) · aᵀ / (1 - p) of x [T, channels] and a [R, channels]. The kernels drop between memory and the matrix units: x is
read once, and a dropped copy is never in memory. They add up in float32 and round once. Cards without matrix units for which
triton compiles (before compute capability 8.0), and 32 bits, run ``drop`` and a plain product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import Draw, Widths, jit, on_device, rows_dense, runs_triton, tl, truncates
from .dropout import (
    DropoutKey,
    add_dropped_,
    drop,
    hash_channels,
    hash_tokens,
    kernel_words,
    sample_key,
    zero_dropped,
)


def dropped_product(x: Tensor, a: Tensor, key: DropoutKey) -> Tensor:
    """z: [T, R] in x's dtype.

    Args:
        x: [T, channels], rows dense, any distance apart.
        a: [R, channels] in x's dtype.
        key: with layer and site set (``DropoutKey.at``).
    """
    if not _in_kernel(x):
        return _twin_product(x, a, key)
    x, a = rows_dense(x), a.contiguous()
    (rows, width), rank = x.shape, a.shape[0]
    z = x.new_empty(rows, rank)
    tile = _tile(rank)
    # with more columns more rows, so that a is read less often
    m, k, warps = (64, 64, 8) if tile == 128 else (32, 128, 4)
    sizes = {"rows": rows, "width": width, "rank": rank, "x_row": x.stride(0), "M": m, "N": tile, "K": k}
    if rows:
        with on_device(x):
            grid = (-(-rank // tile), -(-rows // m))
            _product[grid](x, a, z, *kernel_words(key), **sizes, **_options(x, key, warps, 4))
    return z


def add_input_gradient_(d_x: Tensor, d_z: Tensor, a: Tensor, key: DropoutKey) -> Tensor:
    """d_x += drop(d_z · a) / (1 - p), in place; all in one dtype. Returns d_x [T, channels], whose rows are dense."""
    if not _in_kernel(d_x):
        return _twin_input(d_x, d_z, a, key)
    assert d_x.stride(1) == 1 or d_x.shape[1] == 1, "rows are dense"
    d_z, a = d_z.contiguous(), a.contiguous()
    (rows, width), rank = d_x.shape, a.shape[0]
    m, n, k = 64, 128, min(64, _tile(rank))
    sizes = {"rows": rows, "width": width, "rank": rank, "d_x_row": d_x.stride(0), "M": m, "N": n, "K": k}
    if rows:
        with on_device(d_x):
            grid = (-(-rows // m), -(-width // n))
            _input[grid](d_x, d_z, a, *kernel_words(key), **sizes, **_options(d_x, key, 8, 3))
    return d_x


def matrix_gradient(d_z: Tensor, x: Tensor, key: DropoutKey) -> Tensor:
    """The gradient of a, d_zᵀ · drop(x) / (1 - p): [R, channels], of at least 32 bits."""
    if not _in_kernel(x):
        return _twin_matrix(d_z, x, key)
    d_z, x = d_z.contiguous(), rows_dense(x)
    (rows, width), rank = x.shape, d_z.shape[1]
    splits = matrix_gradient_sums(rows)
    d_a = torch.empty(splits, rank, width, dtype=torch.float32, device=x.device)
    tile, n, k = _tile(rank), 64, 64
    sizes = {"rows": rows, "width": width, "rank": rank, "x_row": x.stride(0), "M": tile, "N": n, "K": k}
    with on_device(x):
        grid = (-(-width // n), -(-rank // tile), splits)
        steps = -(-rows // (k * splits))
        options = _options(x, key, 8 if tile == 128 else 4, 3)
        _matrix[grid](d_z, x, d_a, *kernel_words(key), steps=steps, **sizes, **options)
    return d_a[0] if splits == 1 else d_a.sum(0)


def _in_kernel(x: Tensor) -> bool:
    compiles = x.dtype.itemsize == 2 and (not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0))
    return runs_triton("dropout_products", x) and compiles


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a result of at least 32 bits: a sum over all tokens, rounded to 16 bits, would lose small gradients."""
    if a.dtype.itemsize >= 4:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# The factor 1 / (1 - p) goes to the narrow side.


def _twin_product(x: Tensor, a: Tensor, key: DropoutKey) -> Tensor:
    return (drop(x, key) @ a.T).div_(1 - key.p)


def _twin_input(d_x: Tensor, d_z: Tensor, a: Tensor, key: DropoutKey) -> Tensor:
    return add_dropped_(d_x, (d_z / (1 - key.p)) @ a, key)


def _twin_matrix(d_z: Tensor, x: Tensor, key: DropoutKey) -> Tensor:
    return wide_mm((d_z / (1 - key.p)).T, drop(x, key))


@jit
def _dot(a, b, sums, WIDEN: tl.constexpr):
    """sums + a · b. WIDEN: triton's interpreter multiplies no bfloat16."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums)


@jit(do_not_specialize=["prefix", "limit", "rows"])
def _product(
    x,
    a,
    z,
    streams,
    positions,
    prefix,
    limit,
    scale,
    rows,
    width,
    rank,
    x_row,
    WIDEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """A program computes M rows and N columns of z, from K channels at a time."""
    row = tl.program_id(1).to(tl.int64) * M + tl.arange(0, M)
    r = tl.program_id(0) * N + tl.arange(0, N)
    known = tl.minimum(row, rows - 1)
    of_tokens = hash_tokens(streams, positions, prefix, known)[:, None]
    x_rows = x + known[:, None] * x_row
    sums = tl.zeros((M, N), tl.float32)
    for start in range(0, width, K):
        column = start + tl.arange(0, K)
        inside = (column < width)[None, :]
        # loaded where it is dropped too: loads under a mask without pattern are not vectorized
        part = tl.load(x_rows + column[None, :], mask=inside, other=0.0)
        part = zero_dropped(part, of_tokens, hash_channels(column)[None, :], limit)
        of_a = tl.load(a + r[:, None] * width + column[None, :], mask=(r < rank)[:, None] & inside, other=0.0)
        sums = _dot(part, tl.trans(of_a), sums, WIDEN)
    there = (row < rows)[:, None] & (r < rank)[None, :]
    tl.store(z + row[:, None] * rank + r[None, :], (sums * scale).to(z.dtype.element_ty), mask=there)


@jit(do_not_specialize=["prefix", "limit", "rows"])
def _input(
    d_x,
    d_z,
    a,
    streams,
    positions,
    prefix,
    limit,
    scale,
    rows,
    width,
    rank,
    d_x_row,
    WIDEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """A program adds to M rows and N channels of d_x, from K columns of d_z at a time."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    of_tokens = hash_tokens(streams, positions, prefix, tl.minimum(row, rows - 1))
    sums = tl.zeros((M, N), tl.float32)
    for start in range(0, rank, K):
        r = start + tl.arange(0, K)
        there = (row < rows)[:, None] & (r < rank)[None, :]
        of_z = tl.load(d_z + row[:, None] * rank + r[None, :], mask=there, other=0.0)
        there = (r < rank)[:, None] & (column < width)[None, :]
        of_a = tl.load(a + r[:, None] * width + column[None, :], mask=there, other=0.0)
        sums = _dot(of_z, of_a, sums, WIDEN)
    sums = zero_dropped(sums * scale, of_tokens[:, None], hash_channels(column)[None, :], limit)
    place = d_x + row[:, None] * d_x_row + column[None, :]
    there = (row < rows)[:, None] & (column < width)[None, :]
    before = tl.load(place, mask=there, other=0.0).to(tl.float32)
    tl.store(place, (before + sums).to(d_x.dtype.element_ty), mask=there)


@jit(do_not_specialize=["prefix", "limit", "rows", "steps"])
def _matrix(
    d_z,
    x,
    d_a,
    streams,
    positions,
    prefix,
    limit,
    scale,
    rows,
    width,
    rank,
    x_row,
    steps,
    WIDEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """A program computes M rows and N channels of one of the sums d_a, in steps of K tokens."""
    column = tl.program_id(0) * N + tl.arange(0, N)
    r = tl.program_id(1) * M + tl.arange(0, M)
    of_channels = hash_channels(column)[None, :]
    sums = tl.zeros((N, M), tl.float32)
    for step in range(0, steps):
        row = (tl.program_id(2) * steps + step).to(tl.int64) * K + tl.arange(0, K)
        of_tokens = hash_tokens(streams, positions, prefix, tl.minimum(row, rows - 1))[:, None]
        there = (row < rows)[:, None] & (column < width)[None, :]
        part = tl.load(x + row[:, None] * x_row + column[None, :], mask=there, other=0.0)
        there = (row < rows)[:, None] & (r < rank)[None, :]
        of_z = tl.load(d_z + row[:, None] * rank + r[None, :], mask=there, other=0.0)
        sums = _dot(tl.trans(zero_dropped(part, of_tokens, of_channels, limit)), of_z, sums, WIDEN)
    place = d_a + (tl.program_id(2) * rank + r)[:, None] * width + column[None, :]
    tl.store(place, tl.trans(sums) * scale, mask=(r < rank)[:, None] & (column < width)[None, :])


def _tile(rank: int) -> int:
    """Columns of z that a program takes: few sizes, for each is compiled."""
    return 16 if rank <= 16 else 64 if rank <= 64 else 128


def _options(x: Tensor, key: DropoutKey, warps: int, stages: int) -> dict[str, Any]:
    return {
        "scale": 1 / (1 - key.p),
        "WIDEN": truncates(x.device, x.dtype),
        "num_warps": warps,
        "num_stages": stages,
    }


def matrix_gradient_sums(rows: int) -> int:
    """Into how many sums ``matrix_gradient`` splits its sum over the tokens: enough programs for a card; of 1,024 tokens at
    least, so that they take less memory than a dropped copy of x would."""
    return max(1, min(4, rows // 1024))


def sample(draw: Draw, widths: Widths) -> list[Tensor]:
    """What ``dispatch.check_kernels`` compares: every size of tile, not all of them full."""
    rows, found = 5, []
    for width, rank, p in ((widths.hidden, 48, 0.05), (widths.inner, 16, 0.5), (widths.queries, 144, 0.05)):
        x, d_x, a, d_z = draw(rows, width), draw(rows, width), draw(rank, width), draw(rows, rank)
        key = sample_key(draw, rows, p)
        found += [dropped_product(x, a, key), add_input_gradient_(d_x, d_z, a, key), matrix_gradient(d_z, x, key)]
    return found
