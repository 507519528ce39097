"""The MLP half of a decoder layer, forward and backward, over as many tokens at a time as the plan says.

    y = middle + down(silu(gate) · up),  gate, up = W · norm(middle),  middle = x + out

It is what takes most room in a layer, and no token of it depends on another: 60 KB a token for Mistral-7B in 16 bits
can be had in turn. (Gradients of the adapters are then summed tile by tile.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.lora import grad_adapters, grad_input, grad_low_rank, low_rank, project
from ..ops.rms_norm import rms_norm_backward, rms_norm_forward
from ..ops.swiglu import swiglu_backward, swiglu_forward
from .dequant_buffer import DequantBuffer
from .layer_spec import DOWN, GATE_UP, Layer

Products = tuple[Tensor, ...]


class Kept(NamedTuple):
    """What a backward pass may read instead of computing it again: gate and up [T, 2 I], and the products of the
    adapters on gate and up, and on down."""

    gate_up: Tensor
    gate_up_products: Products
    down_products: Products

    def rows(self, rows: slice) -> Kept:
        """Of some of the tokens. (An adapter that is off has products of no rows.)"""
        cut = [tuple(p[rows] if p.shape[0] else p for p in products) for products in self[1:]]
        return Kept(self.gate_up[rows], *cut)


class Mlp(NamedTuple):
    """What the forward pass computes.

    Attributes:
        y: [T, D].
        middle: [T, D], the residual that it starts from.
        kept: what was asked for of the rest.
    """

    y: Tensor
    middle: Tensor
    kept: Kept | None


def tiles(count: int, size: int | None) -> list[slice]:
    """Slices of at most `size` of `count` tokens; one for all where size is None."""
    if size is None or size >= count:
        return [slice(0, count)]
    return [slice(start, min(count, start + size)) for start in range(0, count, size)]


def mlp_forward(out: Tensor, x: Tensor, layer: Layer, scratch: DequantBuffer, *, tile: int | None, whole: bool) -> Mlp:
    """From the attention's projected output [T, D] and the residual x [T, D]; `out` may be overwritten.

    Args:
        tile: tokens at a time, or None.
        whole: return gate, up and the products as well.
    """
    pieces = tiles(x.shape[0], tile)
    if len(pieces) == 1:
        return _piece(out, x, layer, scratch, whole)
    y = torch.empty_like(x)
    gate_up = x.new_empty(x.shape[0], sum(layer.sites[GATE_UP].outs)) if whole else None
    found = []
    for rows in pieces:
        into = None if gate_up is None else gate_up[rows]
        piece = _piece(out[rows], x[rows], _rows(layer, rows), scratch, whole, y[rows], into)
        out[rows] = piece.middle  # read for the last time
        found.append(piece.kept)
    if gate_up is None:
        return Mlp(y, out, None)
    first, second = (
        tuple(map(torch.cat, zip(*(kept[place] for kept in found if kept is not None)))) for place in (1, 2)
    )
    return Mlp(y, out, Kept(gate_up, first, second))


def _piece(
    out: Tensor,
    x: Tensor,
    layer: Layer,
    scratch: DequantBuffer,
    whole: bool,
    y: Tensor | None = None,
    gate_up: Tensor | None = None,
) -> Mlp:
    """Some tokens' share; y and gate_up go where they are said to."""
    sites, norm = layer.sites, layer.norms[1]
    normed, middle, _ = rms_norm_forward(out, norm.weight, norm.eps, residual=x)
    gate_up_products = low_rank(normed, sites[GATE_UP])
    both = project(normed, _parts(layer, GATE_UP, scratch, x), sites[GATE_UP], gate_up_products, out=gate_up)
    del normed
    act = swiglu_forward(*both.chunk(2, dim=1))
    if not whole:
        del both
    products = low_rank(act, sites[DOWN])
    y = project(act, _parts(layer, DOWN, scratch, x), sites[DOWN], products, add=middle, out=y)
    return Mlp(y, middle, Kept(both, gate_up_products, products) if whole else None)


def mlp_backward(
    grad: Tensor,
    middle: Tensor,
    kept: Kept | None,
    layer: Layer,
    scratch: DequantBuffer,
    *,
    tile: int | None,
    owned: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The gradient of middle [T, D], and those of the adapters on gate and up, and on down.

    Args:
        grad: [T, D], of y.
        middle: [T, D].
        kept: what the forward pass kept; None: it is computed again.
        tile: as in the forward pass.
        owned: whether what was kept may be overwritten.
    """
    pieces = tiles(middle.shape[0], tile)
    d_middle = torch.empty_like(middle) if len(pieces) > 1 else None
    sums: list[list[Tensor]] = [[], []]
    for rows in pieces:
        one = d_middle is None
        piece = layer if one else _rows(layer, rows)
        part, *grads = _piece_backward(
            grad[rows], middle[rows], kept if one or kept is None else kept.rows(rows), piece, scratch, owned
        )
        for site, new in enumerate(grads):
            sums[site] = [a.add_(b) for a, b in zip(sums[site], new)] if sums[site] else new
        if d_middle is None:
            return part, sums[0], sums[1]
        d_middle[rows] = part
    assert d_middle is not None
    return d_middle, sums[0], sums[1]


def _piece_backward(
    grad: Tensor,
    middle: Tensor,
    kept: Kept | None,
    layer: Layer,
    scratch: DequantBuffer,
    owned: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    sites, norm = layer.sites, layer.norms[1]
    of_gate_up: list[Tensor] = []
    of_down: list[Tensor] = []
    if kept is None:
        normed, _, _ = rms_norm_forward(middle, norm.weight, norm.eps)
        gate_up_products = low_rank(normed, sites[GATE_UP])
        gate_up = project(normed, _parts(layer, GATE_UP, scratch, grad), sites[GATE_UP], gate_up_products)
        del normed
        products = None
    else:
        gate_up, gate_up_products, products = kept

    d_products = grad_low_rank(grad, sites[DOWN])
    d_act = grad_input(grad, _parts(layer, DOWN, scratch, grad), sites[DOWN], d_products)
    d_gate_up = gate_up if owned or kept is None else torch.empty_like(gate_up)
    (gate, up), (d_gate, d_up) = gate_up.chunk(2, dim=1), d_gate_up.chunk(2, dim=1)
    _, _, act = swiglu_backward(d_act, gate, up, d_gate, d_up, act=d_act)
    if sites[DOWN].trained:
        products = low_rank(act, sites[DOWN]) if products is None else products
        of_down = grad_adapters(grad, act, sites[DOWN], products, d_products)
    del act, d_act, gate, up, d_gate, d_up, gate_up, kept

    d_products = grad_low_rank(d_gate_up, sites[GATE_UP])
    d_normed = grad_input(d_gate_up, _parts(layer, GATE_UP, scratch, grad), sites[GATE_UP], d_products)
    normed, _, inverse = rms_norm_forward(middle, norm.weight, norm.eps)
    if sites[GATE_UP].trained:
        of_gate_up = grad_adapters(d_gate_up, normed, sites[GATE_UP], gate_up_products, d_products)
    del d_gate_up, normed
    return rms_norm_backward(d_normed, middle, norm.weight, inverse, residual_grad=grad), of_gate_up, of_down


def _parts(layer: Layer, site: int, scratch: DequantBuffer, like: Tensor) -> Any:
    return scratch.parts(layer.sites, site, like.dtype)


def _rows(layer: Layer, rows: slice) -> Layer:
    """For some of the tokens: dropout has to know which."""
    return layer.with_sites(tuple(site.rows(rows) for site in layer.sites))
