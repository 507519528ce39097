"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Llama and Mistral."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import (
    Comparison,
    Widths,
    jit,
    next_power_of_2,
    on_device,
    rows_dense,
    runs_triton,
    samples,
    tl,
)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate queries and keys where they lie.

    Args:
        x: [T, H, d], each token's heads dense beside each other; tokens may lie any distance apart, so that x can be
            the part of a fused [T, (H + 2 H_kv) d] buffer that holds queries and keys.
        cos, sin: [T, r], both halves alike: the first r channels of each head are rotated, all of them or fewer.
        inverse: rotate back, which is also the backward pass.
    Returns:
        x.
    """
    run = _kernel if runs_triton("rope", x) else _twin
    return run(x, cos, sin, inverse)


def _twin(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    half = cos.shape[-1] // 2
    c, s = cos[:, None, :half], sin[:, None, :half]
    sign = -1 if inverse else 1
    first, second = x[..., :half], x[..., half : 2 * half]
    crossed = first * s
    first.mul_(c).addcmul_(second, s, value=-sign)
    second.mul_(c).add_(crossed, alpha=sign)
    return x


@jit
def _rotate(
    x,
    cos,
    sin,
    row_stride,
    angle_stride,
    heads,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """A program takes HEADS heads of a token."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    c = tl.load(cos + row * angle_stride + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * angle_stride + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    there = (head < heads)[:, None] & (column < HALF)[None, :]
    first = x + row * row_stride + head[:, None] * WIDTH + column[None, :]
    a = tl.load(first, mask=there, other=0.0).to(tl.float32)
    b = tl.load(first + HALF, mask=there, other=0.0).to(tl.float32)
    tl.store(first, (a * c - b * s).to(x.dtype.element_ty), mask=there)
    tl.store(first + HALF, (b * c + a * s).to(x.dtype.element_ty), mask=there)


def _kernel(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    tokens, heads, width = x.shape
    if not x.numel():
        return x
    if x.stride(2) != 1 or (heads > 1 and x.stride(1) != width):
        raise ValueError(f"heads lie at strides {x.stride()}, not dense beside each other")
    cos, sin = rows_dense(cos), rows_dense(sin)
    if cos.stride(0) != sin.stride(0):
        cos, sin = cos.contiguous(), sin.contiguous()
    half = cos.shape[-1] // 2
    block = next_power_of_2(half)
    together = min(next_power_of_2(heads), max(1, 1024 // block))
    with on_device(x):
        _rotate[(tokens, -(-heads // together))](
            x,
            cos,
            sin,
            x.stride(0),
            cos.stride(0),
            heads,
            WIDTH=width,
            HALF=half,
            BLOCK=block,
            HEADS=together,
            INVERSE=inverse,
            num_warps=max(1, block * together // 256),
            enable_fp_fusion=True,
        )
    return x


def comparisons(device: torch.device, dtype: torch.dtype, widths: Widths) -> Iterator[Comparison]:
    """Kernel and twin side by side (``dispatch.check_kernels``)."""
    draw = samples(device, dtype)
    tokens, heads, width, rotary = 3, widths.rotated, widths.head, widths.rotary or widths.head
    wide = draw(tokens, heads + 2, width)  # values beside the heads that are rotated
    angle = draw(tokens, rotary // 2).float()
    cos, sin = (torch.cat([f(angle), f(angle)], -1).to(dtype) for f in (torch.cos, torch.sin))
    for inverse in (False, True):
        got, want = wide.clone(), wide.clone()
        _kernel(got[:, :heads], cos, sin, inverse)
        _twin(want[:, :heads], cos, sin, inverse)
        exact = wide.double()
        a, b = exact[:, :heads, :rotary].chunk(2, -1)
        c, s = cos[:, None, : rotary // 2].double(), sin[:, None, : rotary // 2].double() * (-1 if inverse else 1)
        exact[:, :heads, :rotary] = torch.cat([a * c - b * s, b * c + a * s], -1)
        name = f"{rotary} channels of {heads} heads of {width}{', back' if inverse else ''}"
        yield Comparison(name, got[:, :heads], want[:, :heads], exact[:, :heads])
        yield Comparison(f"beside {name}", got[:, heads:], wide[:, heads:], None)
