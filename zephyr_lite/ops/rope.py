"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Llama and Mistral."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys.

    Args:
        x: [T, H, d].
        cos, sin: [T, d], both halves alike, in x's dtype.
    Returns:
        [T, H, d]. Nothing of x is kept: the backward pass is the inverse rotation.
    """
    return _Rope.apply(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    c, s = cos[:, None, :half], sin[:, None, :half]
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x)
    torch.mul(first, c, out=out[..., :half]).sub_(second * s)
    torch.mul(second, c, out=out[..., half:]).add_(first * s)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None
