"""RMSNorm with a frozen weight (Zhang & Sennrich 2019, arXiv 1910.07467), with the residual's addition before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight · x / sqrt(mean(x²) + eps), over the last dimension.

    Args:
        x: [T, D], any floating dtype; statistics are computed in max(float32, its dtype).
        weight: [D], frozen; it receives no gradient.
        eps: added to the mean square.
    Returns:
        [T, D] in x's dtype. Kept for the backward pass: x and one number a row.
    """
    return _RMSNorm.apply(x, weight, eps)


def rms_norm_forward(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of x + residual, in one pass.

    Args:
        x: [T, D], any floating dtype.
        weight: [D], frozen.
        eps: added to the mean square.
        residual: [T, D] in x's dtype.
    Returns:
        y [T, D] = weight · round(h · inverse), rounded to x's dtype where the Hugging Face layer rounds; h [T, D], the
        sum rounded to x's dtype (x itself without a residual); inverse [T] in max(float32, x's dtype).
    """
    run = _kernel_forward if runs_triton("rms_norm", x) else _twin_forward
    return run(x, weight, eps, residual)


def rms_norm_backward(
    grad: Tensor, h: Tensor, weight: Tensor, inverse: Tensor, residual_grad: Tensor | None = None
) -> Tensor:
    """The gradient to h, and so to x and to the residual alike.

    Args:
        grad: [T, D], the gradient to y.
        h, inverse: as ``rms_norm_forward`` returned them.
        residual_grad: [T, D], what else reaches h; added before the one rounding.
    Returns:
        [T, D] in h's dtype, new.
    """
    run = _kernel_backward if runs_triton("rms_norm", h) else _twin_backward
    return run(grad, h, weight, inverse, residual_grad)


def _twin_forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    h = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    inverse = torch.linalg.vector_norm(h, dim=-1, dtype=wide).square_().div_(h.shape[-1]).add_(eps).rsqrt_()
    # the Hugging Face layer rounds the normalized value before it multiplies with the weight
    return (h * inverse[:, None]).to(x.dtype).mul_(weight), h, inverse


def _twin_backward(grad: Tensor, h: Tensor, weight: Tensor, inverse: Tensor, residual_grad: Tensor | None) -> Tensor:
    # with n = h · inverse: dx = inverse · (w · grad - n · mean(w · grad · n)) = inverse · w · grad - h · inverse² · mean
    weighted = (grad.to(inverse.dtype) * weight).mul_(inverse[:, None])
    mean = (weighted * h).sum(-1, keepdim=True).mul_(inverse[:, None].square()).div_(h.shape[-1])
    weighted.addcmul_(h.to(inverse.dtype), mean, value=-1)
    if residual_grad is not None:
        weighted.add_(residual_grad)
    return weighted.to(h.dtype)


@jit
def _forward(
    x,
    residual,
    weight,
    y,
    h,
    inverse,
    eps,
    x_row,
    residual_row,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """A program takes a row, which stays in registers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < D
    value = tl.load(x + row * x_row + column, mask=there, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * residual_row + column, mask=there, other=0.0).to(tl.float32)
        rounded = value.to(h.dtype.element_ty)
        tl.store(h + row * D + column, rounded, mask=there)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    tl.store(inverse + row, scale)
    normalized = (value * scale).to(y.dtype.element_ty).to(tl.float32)
    result = normalized * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row * D + column, result.to(y.dtype.element_ty), mask=there)


@jit
def _backward(
    grad,
    h,
    weight,
    inverse,
    residual_grad,
    dx,
    grad_row,
    h_row,
    residual_row,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < D
    scale = tl.load(inverse + row)
    weighted = tl.load(grad + row * grad_row + column, mask=there, other=0.0).to(tl.float32)
    weighted *= tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    normalized = tl.load(h + row * h_row + column, mask=there, other=0.0).to(tl.float32) * scale
    result = (weighted - normalized * (tl.sum(weighted * normalized, 0) / D)) * scale
    if ADD:
        result += tl.load(residual_grad + row * residual_row + column, mask=there, other=0.0).to(tl.float32)
    tl.store(dx + row * D + column, result.to(dx.dtype.element_ty), mask=there)


def _launch(width: int) -> dict[str, Any]:
    block = next_power_of_2(width)
    # 16 values a thread keep a row in registers and its loads at 16 bytes
    return {"D": width, "BLOCK": block, "num_warps": min(16, max(1, block // 512)), "enable_fp_fusion": True}


def _kernel_forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    x = rows_dense(x)
    residual = None if residual is None else rows_dense(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = x if residual is None else torch.empty_like(y)
    inverse = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if y.numel():
        other = x if residual is None else residual
        with on_device(x):
            _forward[(x.shape[0],)](
                x,
                other,
                weight.contiguous(),
                y,
                h,
                inverse,
                eps,
                x.stride(0),
                other.stride(0),
                ADD=residual is not None,
                **_launch(x.shape[1]),
            )
    return y, h, inverse


def _kernel_backward(grad: Tensor, h: Tensor, weight: Tensor, inverse: Tensor, residual_grad: Tensor | None) -> Tensor:
    grad, h = rows_dense(grad), rows_dense(h)
    other = h if residual_grad is None else rows_dense(residual_grad)
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if dx.numel():
        with on_device(h):
            _backward[(h.shape[0],)](
                grad,
                h,
                weight.contiguous(),
                inverse,
                other,
                dx,
                grad.stride(0),
                h.stride(0),
                other.stride(0),
                ADD=residual_grad is not None,
                **_launch(h.shape[1]),
            )
    return dx


def _exact(x: Tensor, weight: Tensor, eps: float, residual: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, inverse and the gradient to x + residual, itself added once more, in float64 by autograd."""
    x, weight, residual, grad = (t.double() for t in (x, weight, residual, grad))
    h = (x + residual).requires_grad_()
    with torch.enable_grad():
        inverse = (h.square().mean(-1) + eps).rsqrt()
        y = weight * h * inverse[:, None]
        (dx,) = torch.autograd.grad(y, h, grad)
    return y.detach(), inverse.detach(), dx + grad


def comparisons(device: torch.device, dtype: torch.dtype, widths: Widths) -> Iterator[Comparison]:
    """Kernel and twin side by side (``dispatch.check_kernels``)."""
    draw = samples(device, dtype)
    shape = (3, widths.hidden)
    x, residual, grad, weight = draw(*shape), draw(*shape), draw(*shape), draw(shape[1])
    eps = 1.0 if shape[1] == 1 else 1e-5  # of one channel only eps leaves a gradient
    exact = _exact(x, weight, eps, residual, grad)
    got, want = (f(x, weight, eps, residual) for f in (_kernel_forward, _twin_forward))
    yield Comparison(f"y {list(shape)}", got[0], want[0], exact[0])
    yield Comparison(f"h {list(shape)}", got[1], want[1], x.double() + residual.double())
    h, inverse = want[1], want[2]
    back = (grad, h, weight, inverse, grad)
    yield Comparison(f"dx {list(shape)}", _kernel_backward(*back), _twin_backward(*back), exact[2])
    # without a residual
    zero = torch.zeros_like(h)
    y, exact_inverse, dx = _exact(h, weight, eps, zero, grad)
    got, want = (f(h, weight, eps, None) for f in (_kernel_forward, _twin_forward))
    yield Comparison(f"y alone {list(shape)}", got[0], want[0], y)
    yield Comparison(f"inverse {list(shape)}", got[2], want[2], exact_inverse)
    back = (grad, h, weight, inverse, None)
    yield Comparison(f"dx alone {list(shape)}", _kernel_backward(*back), _twin_backward(*back), dx - grad.double())


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        y, h, inverse = rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(h, weight, inverse)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return rms_norm_backward(grad, *ctx.saved_tensors), None, None
