"""A decoder layer (the families of ``family``) as one function, its backward pass written by hand.

What is kept between the two passes is a decision (``keep``), a token and layer of Mistral-7B in 16 bits:

    input       the layer's input; 8 KB
    attention   and the attention's output, its log-sum-exp, and the residual after it; 24 KB
    all         and q, k, v, gate, up, and the adapters' narrow products; 92 KB and what the adapters need

The rest is computed again from that. No policy computes down_proj again: nothing in the backward pass reads its output.
Norms, rotations and SiLU are computed again under every policy: they cost a pass over memory, and no matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.attention import attention_backward, attention_forward
from ..ops.lora import grad_adapters, grad_input, grad_low_rank, low_rank, project
from ..ops.rms_norm import rms_norm_backward, rms_norm_forward
from ..ops.rope import rope_
from .dequant_buffer import DequantBuffer
from .layer_spec import DOWN, GATE_UP, OUT, QKV, ForwardContext, Keep, Layer
from .mlp import Kept, Products, mlp_backward, mlp_forward


def run_layer(x: Tensor, layer: Layer, state: ForwardContext, scratch: DequantBuffer, keep: Keep) -> Tensor:
    """The layer under autograd.

    Args:
        x: [T, D]. Where it requires no gradient (the first layer) none is computed for it.
        scratch: where frozen matrices are dequantized to, by the forward pass and again by the backward pass.
        keep: what is kept for the backward pass. Nothing is where no gradient is wanted.
    Returns:
        [T, D]
    """
    trained = layer.trained
    if torch.is_grad_enabled() and (trained or x.requires_grad):
        return _Layer.apply(x, layer, state, scratch, keep, *trained)
    return _forward(x, layer, state, scratch, None)[0]


@dataclass
class _Activations:
    """What a forward pass computes that a backward pass may read; None: not computed yet, or not kept.

    Attributes:
        x: [T, D].
        qkv: [T, (H + 2 H_kv) d], rotated.
        mixed, lse: the attention's output [T, H d] and its log-sum-exp.
        middle: [T, D], the residual after the attention.
        gate_up: [T, 2 I].
        products: of each site's adapters: q, k, v; o; gate, up; down.
    """

    x: Tensor
    qkv: Tensor | None = None
    mixed: Tensor | None = None
    lse: Tensor | None = None
    middle: Tensor | None = None
    gate_up: Tensor | None = None
    products: tuple[Products | None, ...] = (None, None, None, None)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, layer: Layer, state: ForwardContext, scratch: DequantBuffer, keep: Keep, *trained: Tensor
    ) -> Tensor:  # type: ignore[override]
        y, found = _forward(x, layer, state, scratch, keep)
        ctx.layer, ctx.state, ctx.scratch = layer, state, scratch
        _save(ctx, found, keep)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        layer, state, scratch = ctx.layer, ctx.state, ctx.scratch
        if state.stream is not None:
            state.stream.begin(layer.index, -1)
        found = _restore(ctx)
        if state.offload is not None:
            state.offload.ahead(layer.index - 1)
        _recompute(found, layer, state, scratch)
        d_x, grads = _backward(
            grad.contiguous(),
            found,
            layer,
            state,
            scratch,
            owned=ctx.away is not None,
            need_x=ctx.needs_input_grad[0],
        )
        return (d_x, None, None, None, None, *grads)


def _save(ctx: Any, found: _Activations, keep: Keep) -> None:
    """Hand what the policy keeps to autograd, or to the host."""
    names = ["x"]
    if keep != "input":
        names += ["mixed", "lse", "middle"]
    counts: list[int] = []
    products: list[Tensor] = []
    if keep == "all":
        names += ["qkv", "gate_up"]
        for of_site in found.products:
            assert of_site is not None
            counts.append(len(of_site))
            products += of_site
    tensors = [*(getattr(found, name) for name in names), *products]
    ctx.names, ctx.counts, ctx.away = names, counts, None
    offload = ctx.state.offload
    if offload is not None and ctx.layer.index < offload.layers:
        ctx.away = offload.put(ctx.layer.index, tensors)
        return
    if offload is not None:
        offload.settle()
    ctx.save_for_backward(*tensors)


def _restore(ctx: Any) -> _Activations:
    tensors = iter(ctx.saved_tensors if ctx.away is None else ctx.state.offload.get(ctx.away))
    kept: dict[str, Any] = {name: next(tensors) for name in ctx.names}
    if ctx.counts:
        kept["products"] = tuple(tuple(next(tensors) for _ in range(count)) for count in ctx.counts)
    return _Activations(**kept)


def _forward(
    x: Tensor, layer: Layer, state: ForwardContext, scratch: DequantBuffer, keep: Keep | None
) -> tuple[Tensor, _Activations]:
    """The layer's output, and what `keep` names of what was computed on the way (None: nothing); the rest goes as soon
    as it was read."""
    if state.stream is not None:
        state.stream.begin(layer.index, 1)
    found = _Activations(x)
    normed, _, _ = rms_norm_forward(x, layer.norms[0].weight, layer.norms[0].eps)
    qkv_products = _attend(found, normed, layer, state, scratch)
    del normed
    assert found.mixed is not None
    if keep != "all":
        found.qkv = None
    o_products = low_rank(found.mixed, layer.sites[OUT])
    out = project(found.mixed, _parts(layer, OUT, scratch, x), layer.sites[OUT], o_products)
    if keep in (None, "input"):
        found.mixed = found.lse = None
    mlp = mlp_forward(out, x, layer, scratch, tile=state.tile, whole=keep == "all")
    found.middle = mlp.middle
    if mlp.kept is not None:
        found.gate_up, *of_mlp = mlp.kept
        found.products = (qkv_products, o_products, *of_mlp)
    return mlp.y, found


def _attend(
    found: _Activations,
    normed: Tensor,
    layer: Layer,
    state: ForwardContext,
    scratch: DequantBuffer,
    *,
    mix: bool = True,
) -> Products:
    """From the normalized input to q, k, v and (``mix``) the attention's output; returns the adapters' products."""
    products = low_rank(normed, layer.sites[QKV])
    found.qkv = project(normed, _parts(layer, QKV, scratch, normed), layer.sites[QKV], products)
    q, k, v = _heads(found.qkv, layer)
    rope_(_rotated(found.qkv, layer), state.cos, state.sin)
    if mix:
        mixed, found.lse = attention_forward(q, k, v, state.table, layer.scale)
        found.mixed = mixed.flatten(1)
    return products


def _recompute(found: _Activations, layer: Layer, state: ForwardContext, scratch: DequantBuffer) -> None:
    """Fill in what a backward pass reads of the attention and the policy did not keep."""
    qkv_products, o_products, *of_mlp = found.products
    if found.qkv is None:
        normed, _, _ = rms_norm_forward(found.x, layer.norms[0].weight, layer.norms[0].eps)
        qkv_products = _attend(found, normed, layer, state, scratch, mix=found.mixed is None)
        del normed
    assert found.mixed is not None
    if o_products is None:
        o_products = low_rank(found.mixed, layer.sites[OUT])
    if found.middle is None:
        out = project(found.mixed, _parts(layer, OUT, scratch, found.x), layer.sites[OUT], o_products)
        found.middle = out.add_(found.x)  # to the bit what the norm's kernel gave in the forward pass
    found.products = (qkv_products, o_products, *of_mlp)


def _backward(
    grad: Tensor,
    found: _Activations,
    layer: Layer,
    state: ForwardContext,
    scratch: DequantBuffer,
    *,
    owned: bool,
    need_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of x and of every trained adapter.

    Args:
        grad: [T, D], of the layer's output.
        owned: whether what was kept may be overwritten: not what is autograd's.
    """
    sites, grads = layer.sites, [[], [], [], []]  # type: tuple[Any, ...], list[list[Tensor]]
    middle, kept = found.middle, None
    assert middle is not None
    if found.gate_up is not None:
        _, _, first, second = found.products
        assert first is not None and second is not None
        kept = Kept(found.gate_up, first, second)
        found.gate_up = None
    d_middle, grads[GATE_UP], grads[DOWN] = mlp_backward(
        grad, middle, kept, layer, scratch, tile=state.tile, owned=owned
    )
    del kept, middle
    found.middle = None
    qkv, mixed, lse = found.qkv, found.mixed, found.lse
    assert qkv is not None and mixed is not None and lse is not None

    # middle = x + o(attention(q, k, v))
    d_products = grad_low_rank(d_middle, sites[OUT])
    d_mixed = grad_input(d_middle, _parts(layer, OUT, scratch, grad), sites[OUT], d_products)
    if sites[OUT].trained:
        products = found.products[OUT]
        assert products is not None
        grads[OUT] = grad_adapters(d_middle, mixed, sites[OUT], products, d_products)
    d_qkv = torch.empty_like(qkv)
    q, k, v = _heads(qkv, layer)
    out = mixed.unflatten(1, (layer.heads, layer.head_dim))
    attention_backward(d_mixed.view_as(out), q, k, v, out, lse, state.table, layer.scale, into=_heads(d_qkv, layer))
    del d_mixed, out, mixed
    rope_(_rotated(d_qkv, layer), state.cos, state.sin, inverse=True)

    # q, k, v = W · norm(x)
    d_products = grad_low_rank(d_qkv, sites[QKV], need_all=need_x)
    normed, _, inverse = rms_norm_forward(found.x, layer.norms[0].weight, layer.norms[0].eps)
    if sites[QKV].trained:
        products = found.products[QKV]
        assert products is not None
        grads[QKV] = grad_adapters(d_qkv, normed, sites[QKV], products, d_products)
    d_x = None
    if need_x:
        d_normed = grad_input(d_qkv, _parts(layer, QKV, scratch, grad), sites[QKV], d_products)
        d_x = rms_norm_backward(d_normed, found.x, layer.norms[0].weight, inverse, residual_grad=d_middle)
    return d_x, [g for of_site in grads for g in of_site]


def _parts(layer: Layer, site: int, scratch: DequantBuffer, like: Tensor) -> Any:
    return scratch.parts(layer.sites, site, like.dtype)


def _heads(qkv: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """[T, (H + 2 H_kv) d] → views [T, H, d], [T, H_kv, d], [T, H_kv, d]."""
    whole = qkv.unflatten(1, (-1, layer.head_dim))
    q, k, v = whole.split([layer.heads, layer.kv_heads, layer.kv_heads], dim=1)
    return q, k, v


def _rotated(qkv: Tensor, layer: Layer) -> Tensor:
    """The heads that positions turn, q's and k's: a view [T, H + H_kv, d]."""
    return qkv.unflatten(1, (-1, layer.head_dim))[:, : layer.heads + layer.kv_heads]
