"""RMSNorm with a frozen weight (Zhang & Sennrich 2019, arXiv 1910.07467)."""

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


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        # the Hugging Face layer rounds the normalized value before it multiplies with the weight
        return weight.to(x.dtype) * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        normalized = x.to(inverse.dtype) * inverse
        weighted = (grad * weight.to(grad.dtype)).to(inverse.dtype)
        inner = (weighted * normalized).mean(-1, keepdim=True)
        return ((weighted - normalized * inner) * inverse).to(x.dtype), None, None
