"""Products in 8 bits: kernels, in triton's interpreter where there is no GPU, and twins against exact integer sums."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.contract.test_kernels import DEVICE, DTYPES, both, by_hand, hold, rand, same, stored
from zephyr_lite.ops.int8 import (
    Int8Matrix,
    int8_mm,
    largest_channels,
    outlier_count,
    quantize_rows,
)
from zephyr_lite.ops.int8_weights import requantize, static_scales

# of numpy, in the interpreter
pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value"),
]


def codes(rows, width):
    return torch.randint(-127, 128, (rows, width), dtype=torch.int8).to(DEVICE)


def product(x, weight, low_rank, before):
    """In float64, of exact integer sums."""
    y = (x.codes.long().cpu() @ weight.codes.long().cpu().T).to(DEVICE).double()
    y *= x.scale.double()[:, None] * weight.scale.double()
    if x.outliers is not None:
        y += x.outliers.double() @ weight.outliers.double().T
    if low_rank is not None:
        y += low_rank[0].double() @ low_rank[1].double().T
    return y if before is None else y + before.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "inner", "outliers", "rank", "add"),
    [
        (1, 1, 16, 0, 0, False),  # one token
        (1, 64, 64, 16, 0, True),
        (17, 70, 80, 16, 16, True),  # neither rows, columns nor channels are whole tiles
        (16, 128, 192, 0, 8, False),  # whole tiles, a rank that is no multiple of 16
        (33, 65, 144, 224, 128, True),
        (5, 48, 64, 0, 352, False),
    ],
)
def test_the_product_equals_exact_integer_sums(dtype, rows, columns, inner, outliers, rank, add):
    scales = torch.rand(rows + columns, device=DEVICE) / inner
    kept = [rand(n, outliers, dtype=dtype) if outliers else None for n in (rows, columns)]
    x = Int8Matrix(codes(rows, inner), scales[:rows], kept[0])
    weight = Int8Matrix(codes(columns, inner), scales[rows:], kept[1])
    # columns of a wider product, and a transposed matrix
    low_rank = (rand(rows, rank + 8, dtype=dtype)[:, 8:], rand(rank, columns, dtype=dtype).T) if rank else None
    before = rand(rows, columns, dtype=dtype)
    wide = [torch.full((rows, columns + 3), 7.0, dtype=dtype, device=DEVICE) for _ in range(2)]
    outs = iter([each[:, 1 : columns + 1].copy_(before) for each in wide])
    kernel, twin = both("int8", lambda: int8_mm(x, weight, next(outs), low_rank, add=add), before)
    hold("product", kernel, twin, product(x, weight, low_rank, before if add else None))
    assert all((each[:, [0, -2, -1]] == 7).all() for each in wide)  # elements outside of the result are not written


def test_the_largest_sum_is_exact():
    """Of 28,672 channels, Mistral-7B's widest, every code ±127."""
    ones = torch.full((1, 28_672), 127, dtype=torch.int8, device=DEVICE)
    x, weight = (Int8Matrix(sign * ones, torch.ones(1, device=DEVICE)) for sign in (1, -1))
    for y in both("int8", lambda: int8_mm(x, weight, torch.empty(1, 1, device=DEVICE)), x.scale):
        assert y.item() == -28_672 * 127**2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (4, 576), (3, 1100)])
def test_rows_are_quantized_by_their_largest_value_that_is_no_outlier(dtype, rows, width):
    x = rand(rows, width + 8, dtype=dtype)[:, :width]
    loud = torch.randperm(width, device=DEVICE)[: outlier_count(width)]
    x[:, loud] *= 100
    outliers = largest_channels(x.abs().amax(0))
    assert outliers.channels.tolist() == sorted(loud.tolist())
    kernel, twin = both("int8", lambda: quantize_rows(x, outliers), x)
    assert all(torch.equal(a, b) for a, b in zip(kernel, twin))
    assert torch.equal(kernel.outliers, x[:, outliers.channels])
    quiet = x.double().index_fill(1, outliers.channels, 0)
    torch.testing.assert_close(kernel.scale.double(), quiet.abs().amax(1) / 127)
    error = kernel.codes.double() * kernel.scale.double()[:, None] - quiet
    assert (error.abs() <= 0.5001 * kernel.scale[:, None]).all() and kernel.codes.abs().amax(1).eq(127).all()
    assert not kernel.codes[:, outliers.channels].any()


def test_a_row_of_zeros_and_rows_that_are_not_finite():
    x = torch.ones(5, 64, device=DEVICE)
    x[0], x[1, 3], x[2, 3], x[3] = 0, torch.inf, torch.nan, 1e-38
    weight = quantize_rows(torch.ones(16, 64, device=DEVICE))
    for quantized in both("int8", lambda: quantize_rows(x), x):
        assert quantized.scale[[0, 3]].tolist() == [0, 0] and not quantized.codes[0].any()
        y = int8_mm(quantized, weight, torch.empty(5, 16, device=DEVICE))
        assert y[0].eq(0).all() and y[3].eq(0).all() and torch.allclose(y[4], torch.tensor(64.0))
        assert not y[1].isfinite().any() and y[2].isnan().all()  # as loss scaling needs it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [256, 0])
def test_requantized_weights(dtype, nested):
    """All weights in one launch, both layouts; a row of zeros."""
    shapes = [(70, 192), (1, 64), (64, 128)]
    weights = [stored(shape, nested=nested) for shape in shapes]
    weights.append(stored((3, 64), nested=0) if not nested else weights[1])
    exact = [by_hand(weight).double() for weight in weights]
    scales = [static_scales(weight) for weight in weights]
    for (of_rows, of_columns), matrix in zip(scales, exact):
        torch.testing.assert_close(of_rows.double(), matrix.abs().amax(1) / 127)
        torch.testing.assert_close(of_columns.double(), matrix.abs().amax(0) / 127)
    scales[0][0][5] = 0
    outliers = [largest_channels(matrix.abs().amax(0)) for matrix in exact]

    def run():
        forward, backward = [], []
        for matrix, (of_rows, of_columns), chosen in zip(exact, scales, outliers):
            into = torch.full((2, matrix.numel()), 99, dtype=torch.int8, device=DEVICE)
            kept = torch.zeros(len(matrix), len(chosen.channels), dtype=dtype, device=DEVICE)
            forward.append(Int8Matrix(into[0].view(matrix.shape), of_rows, kept))
            backward.append(Int8Matrix(into[1].view(matrix.shape[::-1]), of_columns))
        requantize(list(zip(weights, forward, outliers)), dtype, transposed=False)
        requantize([(w, b, None) for w, b in zip(weights, backward)], dtype, transposed=True)
        return list(zip(forward, backward))

    kernel, twin = both("int8", run, rand(1, dtype=dtype))
    for matrix, chosen, found, wanted in zip(exact, outliers, kernel, twin):
        quiet = matrix.index_fill(1, chosen.channels, 0)
        for got, want, values in zip(found, wanted, (quiet, matrix.T)):
            assert torch.equal(got.codes, want.codes)
            error = got.codes.double() * got.scale.double()[:, None] - values
            assert (error.abs() <= 0.5001 * got.scale[:, None])[got.scale > 0].all()
            assert not got.codes[got.scale == 0].any() and got.codes.any()
        same(found[0].outliers, matrix[:, chosen.channels].to(dtype))


def test_a_sixty_fourth_of_the_channels_are_outliers():
    assert [outlier_count(width) for width in (64, 576, 1024, 1088, 4096, 14_336)] == [16, 16, 16, 32, 64, 224]
    chosen = largest_channels(torch.tensor([0.0] * 40 + [3.0] * 30))  # the first of equal ones
    assert chosen.channels.tolist() == list(range(40, 56)) and chosen.slots[39:42].tolist() == [-1, 0, 1]
