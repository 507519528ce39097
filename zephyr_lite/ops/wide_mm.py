"""A matrix product with a result of at least 32 bits."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a result of at least 32 bits: a sum over all tokens, rounded to 16 bits, would lose small gradients."""
    if a.dtype.itemsize >= 4:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
