"""The MLP half of a decoder layer, forward and backward, optionally a chunk of tokens at a time.

    y = residual + [norm of] down(act(gate) · up),  gate, up = W · norm(residual),  residual = x + out

It needs more memory than the rest of the layer (60 KB a token for Mistral-7B in 16 bits), and no token depends on another.
Gradients of the adapters are summed over the chunks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops.lora import grad_adapters, grad_input, grad_low_rank, low_rank, project
from ..ops.swiglu import swiglu_backward, swiglu_forward
from .dequant_buffer import DequantBuffer
from .execution import DOWN, GATE_UP, Keep, Layer

LoraActivations = tuple[Tensor, ...]
# what the backward pass would otherwise recompute: gate and up [T, 2 I], and the adapters' narrow products of gate and up, and
# of down
Kept = tuple[Tensor, LoraActivations, LoraActivations]


def mlp_forward(
    out: Tensor, x: Tensor, layer: Layer, scratch: DequantBuffer, *, mlp_chunk: int | None, keep: Keep | None
) -> tuple[Tensor, Kept | None]:
    """From the attention's projected output [T, D] and the residual x [T, D]. `out` becomes the residual before the MLP, or y
    where that is not kept.

    Args:
        mlp_chunk: tokens at a time, or None.
        keep: of the layer; "all": return gate, up and the adapters' products as well.
    Returns:
        y [T, D], and what was kept.
    """
    count = x.shape[0]
    y = out if keep in (None, "input") and not layer.post_norms else torch.empty_like(out)
    if mlp_chunk is None or mlp_chunk >= count:
        return y, _chunk_forward(out, x, y, layer, scratch, keep)
    gate_up = x.new_empty(count, sum(layer.sites[GATE_UP].outs)) if keep == "all" else None
    kept: list[Any] = []
    for start in range(0, count, mlp_chunk):
        rows = slice(start, min(count, start + mlp_chunk))
        part = out[rows]
        into = None if gate_up is None else gate_up[rows]
        kept.append(
            _chunk_forward(part, x[rows], part if y is out else y[rows], _rows(layer, rows), scratch, keep, into)
        )
    if gate_up is None:
        return y, None
    _, gate_up_lora, down_lora = zip(*kept)
    return y, (gate_up, tuple(map(torch.cat, zip(*gate_up_lora))), tuple(map(torch.cat, zip(*down_lora))))


def _chunk_forward(
    out: Tensor,
    x: Tensor,
    y: Tensor,
    layer: Layer,
    scratch: DequantBuffer,
    keep: Keep | None,
    gate_up: Tensor | None = None,
) -> Kept | None:
    """Some of the tokens; y (which may be `out`) and gate_up are output buffers."""
    sites, post_norms = layer.sites, layer.post_norms
    # the residual is in y before down_proj's product is added to it
    copy = None if y is out or post_norms else y
    normed, _, _ = layer.norms[1].forward(out, residual=x, h=out, copy=copy)
    gate_up_lora = low_rank(normed, sites[GATE_UP])
    both = project(normed, scratch.parts(sites, GATE_UP, x.dtype), sites[GATE_UP], gate_up_lora, out=gate_up)
    del normed
    act = swiglu_forward(*both.chunk(2, dim=1), activation=layer.activation)
    kept = both if keep == "all" else None
    del both
    down_lora = low_rank(act, sites[DOWN])
    project(act, scratch.parts(sites, DOWN, x.dtype), sites[DOWN], down_lora, add=not post_norms, out=y)
    if post_norms:
        post_norms[1].forward(y, out=y)[0].add_(out)
    return None if kept is None else (kept, gate_up_lora, down_lora)


def mlp_backward(
    grad: Tensor,
    residual: Tensor,
    kept: Kept | None,
    layer: Layer,
    scratch: DequantBuffer,
    *,
    mlp_chunk: int | None,
    owned: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The gradient of the residual [T, D], and those of the adapters on gate and up, and on down.

    Args:
        grad: [T, D], of y.
        residual: [T, D].
        kept: from the forward pass; None: recompute.
        mlp_chunk: as in the forward pass.
        owned: whether the kept tensors may be overwritten.
    """
    count = residual.shape[0]
    if mlp_chunk is None or mlp_chunk >= count:
        return _chunk_backward(grad, residual, kept, layer, scratch, owned)
    d_residual = torch.empty_like(residual)
    sums: list[list[Tensor]] = [[], []]
    for start in range(0, count, mlp_chunk):
        rows = slice(start, min(count, start + mlp_chunk))
        of_rows = None
        if kept is not None:
            # an adapter that is off has products of no rows
            first, second = (tuple(p[rows] if p.shape[0] else p for p in lora) for lora in kept[1:])
            of_rows = (kept[0][rows], first, second)
        part, *grads = _chunk_backward(grad[rows], residual[rows], of_rows, _rows(layer, rows), scratch, owned)
        for site, new in enumerate(grads):
            sums[site] = [a.add_(b) for a, b in zip(sums[site], new)] if sums[site] else new
        d_residual[rows] = part
    return d_residual, sums[0], sums[1]


def _chunk_backward(
    grad: Tensor,
    residual: Tensor,
    kept: Kept | None,
    layer: Layer,
    scratch: DequantBuffer,
    owned: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    sites, norm = layer.sites, layer.norms[1]
    gate_up_grads: list[Tensor] = []
    down_grads: list[Tensor] = []
    if kept is None:
        normed, _, _ = norm.forward(residual)
        gate_up_lora = low_rank(normed, sites[GATE_UP])
        gate_up = project(normed, scratch.parts(sites, GATE_UP, grad.dtype), sites[GATE_UP], gate_up_lora)
        del normed
        down_lora = None
    else:
        gate_up, gate_up_lora, down_lora = kept

    d_down = grad
    if layer.post_norms:
        act = swiglu_forward(*gate_up.chunk(2, dim=1), activation=layer.activation)
        down_lora = low_rank(act, sites[DOWN]) if down_lora is None else down_lora
        down = project(act, scratch.parts(sites, DOWN, grad.dtype), sites[DOWN], down_lora)
        _, _, inverse = layer.post_norms[1].forward(down)
        d_down = layer.post_norms[1].backward(grad, down, inverse)
        del act, down
    d_lora = grad_low_rank(d_down, sites[DOWN])
    d_act = grad_input(d_down, scratch.parts(sites, DOWN, grad.dtype, backward=True), sites[DOWN], d_lora)
    d_gate_up = gate_up if owned or kept is None else torch.empty_like(gate_up)
    (gate, up), (d_gate, d_up) = gate_up.chunk(2, dim=1), d_gate_up.chunk(2, dim=1)
    _, _, act = swiglu_backward(d_act, gate, up, d_gate, d_up, act=d_act, activation=layer.activation)
    if sites[DOWN].trained:
        down_lora = low_rank(act, sites[DOWN]) if down_lora is None else down_lora
        down_grads = grad_adapters(d_down, act, sites[DOWN], down_lora, d_lora)
    del act, d_act, d_down, gate, up, d_gate, d_up, gate_up, kept

    d_lora = grad_low_rank(d_gate_up, sites[GATE_UP])
    d_normed = grad_input(d_gate_up, scratch.parts(sites, GATE_UP, grad.dtype, backward=True), sites[GATE_UP], d_lora)
    normed, _, inverse = norm.forward(residual)
    if sites[GATE_UP].trained:
        gate_up_grads = grad_adapters(d_gate_up, normed, sites[GATE_UP], gate_up_lora, d_lora)
    del d_gate_up, normed
    d_residual = norm.backward(d_normed, residual, inverse, residual_grad=grad)
    return d_residual, gate_up_grads, down_grads


def _rows(layer: Layer, rows: slice) -> Layer:
    """The layer for some of the tokens: dropout has to know which."""
    return replace(layer, sites=tuple(site.rows(rows) for site in layer.sites))
