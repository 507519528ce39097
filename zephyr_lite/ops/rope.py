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


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate queries and keys where they lie.

    Args:
        x: [T, H, d], each token's heads dense beside each other; tokens may lie any distance apart, so that x can be
            the part of a fused [T, (H + 2 H_kv) d] buffer that holds queries and keys.
        cos, sin: [T, d], both halves alike.
        inverse: rotate back, which is also the backward pass.
    Returns:
        x.
    """
    return _twin(x, cos, sin, inverse)


def _twin(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    half = x.shape[-1] // 2
    c, s = cos[:, None, :half], sin[:, None, :half]
    sign = -1 if inverse else 1
    first, second = x[..., :half], x[..., half:]
    crossed = first * s
    first.mul_(c).addcmul_(second, s, value=-sign)
    second.mul_(c).add_(crossed, alpha=sign)
    return x


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return rope_(x.clone(memory_format=torch.contiguous_format), cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return rope_(grad.clone(memory_format=torch.contiguous_format), cos, sin, inverse=True), None, None
