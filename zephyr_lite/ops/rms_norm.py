"""RMSNorm with a frozen weight (Zhang & Sennrich 2019, arXiv 1910.07467), with the residual's addition before it."""

from __future__ import annotations

import torch
from torch import Tensor


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
    return _forward(x, weight, eps, residual)


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
    return _backward(grad, h, weight, inverse, residual_grad)


def _forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    h = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    inverse = torch.linalg.vector_norm(h, dim=-1, dtype=wide).square_().div_(h.shape[-1]).add_(eps).rsqrt_()
    # the Hugging Face layer rounds the normalized value before it multiplies with the weight
    return (h * inverse[:, None]).to(x.dtype).mul_(weight), h, inverse


def _backward(grad: Tensor, h: Tensor, weight: Tensor, inverse: Tensor, residual_grad: Tensor | None) -> Tensor:
    # with n = h · inverse: dx = inverse · (w · grad - n · mean(w · grad · n)) = inverse · w · grad - h · inverse² · mean
    weighted = (grad.to(inverse.dtype) * weight).mul_(inverse[:, None])
    mean = (weighted * h).sum(-1, keepdim=True).mul_(inverse[:, None].square()).div_(h.shape[-1])
    weighted.addcmul_(h.to(inverse.dtype), mean, value=-1)
    if residual_grad is not None:
        weighted.add_(residual_grad)
    return weighted.to(h.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        y, h, inverse = rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(h, weight, inverse)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return rms_norm_backward(grad, *ctx.saved_tensors), None, None
