"""SwiGLU and GeGLU, the gated half of an MLP (Shazeer 2020, arXiv 2002.05202): act(gate) · up.

The activation is transformers' name of it: ``silu``, or ``gelu_pytorch_tanh``. Both are gate · sigmoid(inner): of the gate
itself, or of 2 sqrt(2 / pi) (gate + 0.044715 gate³), because (1 + tanh(z)) / 2 = sigmoid(2 z).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import Draw, Widths, jit, next_power_of_2, on_device, rows_dense, runs_triton, tl


def swiglu_forward(gate: Tensor, up: Tensor, out: Tensor | None = None, *, activation: str = "silu") -> Tensor:
    """act(gate) · up.

    Args:
        gate, up: [T, I], rows dense, any distance apart (the halves of one [T, 2 I] buffer, say).
        out: [T, I], may be gate or up.
    Returns:
        [T, I]: `out`, or new.
    """
    if not runs_triton("swiglu", gate):
        act = _activated(gate, activation).mul_(up)
        return act if out is None else out.copy_(act)
    gate, up = rows_dense(gate), rows_dense(up)
    out = _output(out, gate)
    if gate.numel():
        grid, options = _grid(gate, activation)
        with on_device(gate):
            _forward[grid](gate, up, out, gate.stride(0), up.stride(0), out.stride(0), **options)
    return out


def swiglu_backward(
    grad_act: Tensor,
    gate: Tensor,
    up: Tensor,
    d_gate: Tensor | None = None,
    d_up: Tensor | None = None,
    act: Tensor | None = None,
    *,
    activation: str = "silu",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to gate and up, and act(gate) · up again, in one pass.

    Args:
        grad_act: [T, I], the gradient to the product.
        gate, up: [T, I], rows dense, any distance apart.
        d_gate, d_up, act: [T, I] to write into; each may be one of the inputs, element for element (d_gate over gate,
            d_up over up, act over grad_act). None: new.
    Returns:
        (d_gate, d_up, act).
    """
    if not runs_triton("swiglu", gate):
        # two buffers of our own, and every input is read for the last time before an output may lie over it
        activated = _activated(gate, activation)
        product = torch.mul(grad_act, up, out=torch.empty_like(activated))
        if d_gate is None:
            d_gate = torch.empty_like(product)
        if activation == "silu":
            torch.ops.aten.silu_backward.grad_input(product, gate, grad_input=d_gate)
        else:
            torch.ops.aten.gelu_backward.grad_input(product, gate, approximate="tanh", grad_input=d_gate)
        torch.mul(activated, up, out=product)
        d_up = torch.mul(activated, grad_act, out=activated if d_up is None else d_up)
        return d_gate, d_up, product if act is None else act.copy_(product)
    tensors = [rows_dense(t) for t in (grad_act, gate, up)] + [_output(t, gate) for t in (d_gate, d_up, act)]
    if gate.numel():
        grid, options = _grid(gate, activation)
        with on_device(gate):
            _backward[grid](*tensors, *(t.stride(0) for t in tensors), **options)
    return tensors[3], tensors[4], tensors[5]


def _activated(gate: Tensor, activation: str) -> Tensor:
    """Into a dense buffer: without one, torch takes more than twice as long for rows that lie apart."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if activation == "silu":
        return torch.ops.aten.silu.out(gate, out=out)
    return torch.ops.aten.gelu.out(gate, approximate="tanh", out=out)


@jit
def _forward(
    gate, up, out, gate_row, up_row, out_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr
):
    """A program takes BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    g = tl.load(gate + row * gate_row + column, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=there, other=0.0).to(tl.float32)
    inner = g
    if ACTIVATION == "gelu_pytorch_tanh":
        inner = 1.5957691216057308 * g * (1.0 + 0.044715 * g * g)
    # of -|inner|: nothing overflows
    e = tl.exp(-tl.abs(inner))
    sigmoid = tl.where(inner >= 0, 1.0, e) / (1.0 + e)
    tl.store(out + row * out_row + column, (g * sigmoid * u).to(out.dtype.element_ty), mask=there)


@jit
def _backward(
    grad,
    gate,
    up,
    d_gate,
    d_up,
    act,
    grad_row,
    gate_row,
    up_row,
    d_gate_row,
    d_up_row,
    act_row,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """As above; everything is read before anything is written, so outputs may lie over inputs."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < WIDTH
    d = tl.load(grad + row * grad_row + column, mask=there, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + column, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=there, other=0.0).to(tl.float32)
    inner = g
    if ACTIVATION == "gelu_pytorch_tanh":
        inner = 1.5957691216057308 * g * (1.0 + 0.044715 * g * g)
    e = tl.exp(-tl.abs(inner))
    sigmoid = tl.where(inner >= 0, 1.0, e) / (1.0 + e)
    activated = g * sigmoid
    # 1 - sigmoid, without its cancellation
    rest = tl.where(inner >= 0, e, 1.0) / (1.0 + e)
    slope = activated * rest
    if ACTIVATION == "gelu_pytorch_tanh":
        slope *= 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    tl.store(d_gate + row * d_gate_row + column, (d * u * (sigmoid + slope)).to(d_gate.dtype.element_ty), mask=there)
    tl.store(d_up + row * d_up_row + column, (d * activated).to(d_up.dtype.element_ty), mask=there)
    tl.store(act + row * act_row + column, (activated * u).to(act.dtype.element_ty), mask=there)


def _grid(like: Tensor, activation: str) -> tuple[tuple[int, int], dict[str, Any]]:
    rows, width = like.shape
    block = min(1024, next_power_of_2(width))
    options = {"WIDTH": width, "BLOCK": block, "ACTIVATION": activation, "num_warps": max(1, block // 256)}
    return (rows, -(-width // block)), {**options, "enable_fp_fusion": True}


def _output(given: Tensor | None, like: Tensor) -> Tensor:
    if given is None:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    assert given.shape == like.shape and (given.shape[1] == 1 or given.stride(1) == 1), "an output has dense rows"
    return given


def sample(draw: Draw, widths: Widths) -> list[Tensor]:
    """What ``dispatch.check_kernels`` compares."""
    act = {"activation": widths.activation}
    (gate, up), grad = (draw(3, 2 * widths.inner) * 2).chunk(2, -1), draw(3, widths.inner)
    forward, backward = swiglu_forward(gate, up, **act), swiglu_backward(grad, gate, up, **act)
    return [forward, *backward, *swiglu_backward(grad, gate, up, gate, up, grad, **act)]  # the last over the inputs
