"""SwiGLU, the gated half of a Llama MLP (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise, [T, I]. Kept for the backward pass: gate and up."""
    return _SwiGLU.apply(gate, up)


def swiglu_forward(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) · up.

    Args:
        gate, up: [T, I], rows dense, any distance apart (the halves of one [T, 2 I] buffer, say).
        out: [T, I], may be gate or up.
    Returns:
        [T, I]: `out`, or new.
    """
    return _forward(gate, up, out)


def swiglu_backward(
    grad_act: Tensor,
    gate: Tensor,
    up: Tensor,
    d_gate: Tensor | None = None,
    d_up: Tensor | None = None,
    act: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to gate and up, and silu(gate) · up again, in one pass.

    Args:
        grad_act: [T, I], the gradient to the product.
        gate, up: [T, I], rows dense, any distance apart.
        d_gate, d_up, act: [T, I] to write into; each may be one of the inputs, element for element (d_gate over gate,
            d_up over up, act over grad_act). None: new.
    Returns:
        (d_gate, d_up, act).
    """
    return _backward(grad_act, gate, up, d_gate, d_up, act)


def _forward(gate: Tensor, up: Tensor, out: Tensor | None) -> Tensor:
    act = F.silu(gate).mul_(up)
    return act if out is None else out.copy_(act)


def _backward(
    grad_act: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor | None, d_up: Tensor | None, act: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    # two buffers of our own, and every input is read for the last time before an output may lie over it
    silu = F.silu(gate)
    product = grad_act * up
    if d_gate is None:
        d_gate = torch.empty_like(product)
    torch.ops.aten.silu_backward.grad_input(product, gate, grad_input=d_gate)
    torch.mul(silu, up, out=product)
    d_up = torch.mul(silu, grad_act, out=silu if d_up is None else d_up)
    return d_gate, d_up, product if act is None else act.copy_(product)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        d_gate, d_up, _ = swiglu_backward(grad.contiguous(), *ctx.saved_tensors)
        return d_gate, d_up
