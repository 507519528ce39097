"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Llama and Mistral."""

from __future__ import annotations

from torch import Tensor

from .dispatch import Draw, Widths, jit, next_power_of_2, on_device, runs_triton, tl


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
    if not runs_triton("rope", x):
        half, sign = cos.shape[-1] // 2, -1 if inverse else 1
        c, s = cos[:, None, :half], sin[:, None, :half]
        first, second = x[..., :half], x[..., half : 2 * half]
        crossed = first * s
        first.mul_(c).addcmul_(second, s, value=-sign)
        second.mul_(c).add_(crossed, alpha=sign)
        return x
    tokens, heads, width = x.shape
    if not x.numel():
        return x
    if x.stride(2) != 1 or (heads > 1 and x.stride(1) != width):
        raise ValueError(f"heads lie at strides {x.stride()}, not dense beside each other")
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


def sample(draw: Draw, widths: Widths) -> list[Tensor]:
    """What ``dispatch.check_kernels`` compares."""
    rotary, found = widths.rotary or widths.head, []
    for inverse in (False, True):
        wide = draw(3, widths.rotated + 2, widths.head)  # values beside the heads that are rotated
        cos, sin = (draw(3, rotary // 2).repeat(1, 2) for _ in range(2))
        rope_(wide[:, : widths.rotated], cos, sin, inverse)
        found.append(wide)
    return found
