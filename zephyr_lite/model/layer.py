"""A decoder layer (the families of ``families``) as one autograd function with a hand-written backward pass.

``keep`` decides which tensors are kept for the backward pass; bytes a token and layer of Mistral-7B in 16 bits:

    input       the layer's input; 8 KB
    attention   also the attention's output, its log-sum-exp, and the residual after it; 24 KB
    all         also q, k, v, gate, up, and the adapters' narrow products; 92 KB and the adapters' share

The rest is recomputed. down_proj only is where a norm follows it: otherwise the backward pass does not read its output. Norms,
rotations and the MLP's activation always are: they cost a pass over memory and no matrix product.

Norms of q's and k's heads change no kept byte: q and k are kept as they were projected, and normalized and rotated again. Nor do
norms after the attention: o_proj's output is kept in place of the residual, which is a norm and a sum away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.attention import attention_backward, attention_forward
from ..ops.lora import grad_adapters, grad_input, grad_low_rank, low_rank, project
from ..ops.rope import rope_
from .dequant_buffer import DequantBuffer
from .execution import DOWN, GATE_UP, OUT, QKV, ForwardContext, Keep, Layer
from .mlp import LoraActivations, mlp_backward, mlp_forward


def run_layer(x: Tensor, layer: Layer, state: ForwardContext, scratch: DequantBuffer, keep: Keep) -> Tensor:
    """The layer under autograd.

    Args:
        x: [T, D]. Where it requires no gradient (the first layer) none is computed for it.
        scratch: buffer for dequantized frozen matrices, in both passes.
        keep: tensors to keep for the backward pass; none where no gradient is wanted.
    Returns:
        [T, D]
    """
    trained = [parameter for site in layer.sites for parameter in site.trained]
    if torch.is_grad_enabled() and (trained or x.requires_grad):
        return _Layer.apply(x, layer, state, scratch, keep, *trained)
    return _forward(x, layer, state, scratch, None)[0]


@dataclass
class _Activations:
    """Tensors that the backward pass reads; None: not computed yet, or not kept.

    Attributes:
        x: [T, D], the layer's input.
        qkv: [T, (H + 2 H_kv) d], rotated; with norms of the heads, as projected.
        attn_out, lse: the attention's output [T, H d] and its log-sum-exp.
        out: [T, D], o_proj's output, and inverse: [T] of the norm that follows it; None where none does.
        residual: [T, D], after the attention.
        gate_up: [T, 2 I].
        lora: narrow products of the adapters of each site: q, k, v; o; gate, up; down.
    """

    x: Tensor
    qkv: Tensor | None = None
    attn_out: Tensor | None = None
    lse: Tensor | None = None
    out: Tensor | None = None
    inverse: Tensor | None = None
    residual: Tensor | None = None
    gate_up: Tensor | None = None
    lora: tuple[LoraActivations | None, ...] = (None, None, None, None)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, layer: Layer, state: ForwardContext, scratch: DequantBuffer, keep: Keep, *trained: Tensor
    ) -> Tensor:  # type: ignore[override]
        y, acts = _forward(x, layer, state, scratch, keep)
        ctx.layer, ctx.state, ctx.scratch = layer, state, scratch
        tensors, ctx.counts, ctx.away = [acts.x], [], None
        if keep != "input":
            tensors += [acts.attn_out, acts.lse, acts.out if layer.post_norms else acts.residual]
        if keep == "all":
            tensors += [acts.qkv, acts.gate_up]
            for of_site in acts.lora:
                assert of_site is not None
                ctx.counts.append(len(of_site))
                tensors += of_site
        offload = state.offload
        if offload is not None and layer.index < offload.layers:
            ctx.away = offload.put(layer.index, tensors)
            return y
        if offload is not None:
            offload.wait_pending()
        ctx.save_for_backward(*tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        layer, state, scratch = ctx.layer.cast(grad.dtype), ctx.state, ctx.scratch
        if state.stream is not None:
            state.stream.begin(layer.index, -1)
        acts = _restore(ctx)
        if state.offload is not None:
            state.offload.prefetch(layer.index - 1)
        _recompute(acts, layer, state, scratch)
        d_x, grads = _backward(
            grad.contiguous(),
            acts,
            layer,
            state,
            scratch,
            owned=ctx.away is not None,
            need_x=ctx.needs_input_grad[0],
        )
        return (d_x, None, None, None, None, *grads)


def _restore(ctx: Any) -> _Activations:
    """What the forward pass kept, from autograd or from the activation offload."""
    tensors = ctx.saved_tensors if ctx.away is None else ctx.state.offload.get(ctx.layer.index, ctx.away)
    acts = _Activations(tensors[0])
    if len(tensors) > 1:
        acts.attn_out, acts.lse, after = tensors[1:4]
        acts.out, acts.residual = (after, None) if ctx.layer.post_norms else (None, after)
    if ctx.counts:
        acts.qkv, acts.gate_up = tensors[4:6]
        start, lora = 6, []
        for count in ctx.counts:
            lora.append(tuple(tensors[start : start + count]))
            start += count
        acts.lora = tuple(lora)
    return acts


def _forward(
    x: Tensor, layer: Layer, state: ForwardContext, scratch: DequantBuffer, keep: Keep | None
) -> tuple[Tensor, _Activations]:
    """The layer's output, and the activations that `keep` names (None: none); others are freed as soon as they were read."""
    if state.stream is not None:
        state.stream.begin(layer.index, 1)
    layer = layer.cast(x.dtype)
    acts = _Activations(x)
    normed, _, _ = layer.norms[0].forward(x)
    qkv_lora = _attend(acts, normed, layer, state, scratch)
    del normed
    assert acts.attn_out is not None
    if keep != "all":
        acts.qkv = None
    o_lora = low_rank(acts.attn_out, layer.sites[OUT])
    out = project(acts.attn_out, scratch.parts(layer.sites, OUT, x.dtype), layer.sites[OUT], o_lora)
    if layer.post_norms:
        acts.out = out
        out, _, _ = layer.post_norms[0].forward(out)
    if keep in (None, "input"):
        acts.attn_out = acts.lse = acts.out = None
    y, kept = mlp_forward(out, x, layer, scratch, mlp_chunk=state.mlp_chunk, keep=keep)
    acts.residual = None if y is out else out
    if kept is not None:
        acts.gate_up, *of_mlp = kept
        acts.lora = (qkv_lora, o_lora, *of_mlp)
    return y, acts


def _attend(
    acts: _Activations,
    normed: Tensor,
    layer: Layer,
    state: ForwardContext,
    scratch: DequantBuffer,
    *,
    attend: bool = True,
) -> LoraActivations:
    """From the normalized input to q, k, v and (``attend``) the attention's output; returns the adapters' products."""
    lora = low_rank(normed, layer.sites[QKV])
    acts.qkv = project(normed, scratch.parts(layer.sites, QKV, normed.dtype), layer.sites[QKV], lora)
    if not layer.head_norms:
        _rotate(_rotated(acts.qkv, layer), layer, state)
    if attend:
        q, k, v, _ = _query_key_value(acts.qkv, layer, state)
        attn_out, acts.lse = attention_forward(q, k, v, state.table, layer.scale)
        acts.attn_out = attn_out.flatten(1)
    return lora


def _recompute(acts: _Activations, layer: Layer, state: ForwardContext, scratch: DequantBuffer) -> None:
    """Recompute the attention's tensors that were not kept."""
    qkv_lora, o_lora, *of_mlp = acts.lora
    if acts.qkv is None:
        normed, _, _ = layer.norms[0].forward(acts.x)
        qkv_lora = _attend(acts, normed, layer, state, scratch, attend=acts.attn_out is None)
        del normed
    assert acts.attn_out is not None
    if o_lora is None:
        o_lora = low_rank(acts.attn_out, layer.sites[OUT])
    if acts.residual is None:
        out = acts.out
        if out is None:
            out = project(acts.attn_out, scratch.parts(layer.sites, OUT, acts.x.dtype), layer.sites[OUT], o_lora)
        if layer.post_norms:
            out, acts.out, acts.inverse = layer.post_norms[0].forward(out)
        acts.residual = out.add_(acts.x)  # bit for bit the sum of the norm's kernel in the forward pass
    acts.lora = (qkv_lora, o_lora, *of_mlp)


def _backward(
    grad: Tensor,
    acts: _Activations,
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
        owned: whether the kept tensors may be overwritten (autograd's may not).
    """
    sites, grads = layer.sites, [[], [], [], []]  # type: tuple[Any, ...], list[list[Tensor]]
    residual, kept = acts.residual, None
    assert residual is not None
    if acts.gate_up is not None:
        _, _, gate_up_lora, down_lora = acts.lora
        assert gate_up_lora is not None and down_lora is not None
        kept = (acts.gate_up, gate_up_lora, down_lora)
        acts.gate_up = None
    d_residual, grads[GATE_UP], grads[DOWN] = mlp_backward(
        grad, residual, kept, layer, scratch, mlp_chunk=state.mlp_chunk, owned=owned
    )
    del kept, residual
    acts.residual = None
    qkv, attn_out, lse = acts.qkv, acts.attn_out, acts.lse
    assert qkv is not None and attn_out is not None and lse is not None

    # residual = x + [norm of] o(attention(q, k, v))
    d_out = d_residual
    if layer.post_norms:
        assert acts.out is not None and acts.inverse is not None
        d_out = layer.post_norms[0].backward(d_residual, acts.out, acts.inverse)
        acts.out = None
    d_lora = grad_low_rank(d_out, sites[OUT])
    d_attn_out = grad_input(d_out, scratch.parts(layer.sites, OUT, grad.dtype, backward=True), sites[OUT], d_lora)
    if sites[OUT].trained:
        lora = acts.lora[OUT]
        assert lora is not None
        grads[OUT] = grad_adapters(d_out, attn_out, sites[OUT], lora, d_lora)
    del d_out
    d_qkv = torch.empty_like(qkv)
    q, k, v, inverses = _query_key_value(qkv, layer, state)
    out = attn_out.unflatten(1, (layer.heads, layer.head_dim))
    into = d_qkv.unflatten(1, (-1, layer.head_dim))
    attention_backward(d_attn_out.view_as(out), q, k, v, out, lse, state.table, layer.scale, into)
    del d_attn_out, out, attn_out, q, k, v, into
    _rotate(_rotated(d_qkv, layer), layer, state, inverse=True)
    for norm, part, h, inverse in zip(layer.head_norms, _heads(d_qkv, layer), _heads(qkv, layer), inverses):
        norm.backward(part, h, inverse, out=part)

    # q, k, v = W · norm(x)
    d_lora = grad_low_rank(d_qkv, sites[QKV], need_all=need_x)
    normed, _, inverse = layer.norms[0].forward(acts.x)
    if sites[QKV].trained:
        lora = acts.lora[QKV]
        assert lora is not None
        grads[QKV] = grad_adapters(d_qkv, normed, sites[QKV], lora, d_lora)
    d_x = None
    if need_x:
        d_normed = grad_input(d_qkv, scratch.parts(layer.sites, QKV, grad.dtype, backward=True), sites[QKV], d_lora)
        d_x = layer.norms[0].backward(d_normed, acts.x, inverse, residual_grad=d_residual)
    return d_x, [*grads[QKV], *grads[OUT], *grads[GATE_UP], *grads[DOWN]]


def _query_key_value(qkv: Tensor, layer: Layer, state: ForwardContext) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """q, k and v as the attention reads them: views of qkv, or q and k in a buffer of their own if their heads have norms, whose
    inverses come with them."""
    q, k, v = _heads(qkv, layer)
    if not layer.head_norms:
        return q, k, v, []
    both = qkv.new_empty(qkv.shape[0], layer.heads + layer.kv_heads, layer.head_dim)
    parts = both.split([layer.heads, layer.kv_heads], dim=1)
    inverses = [norm.forward(h, out=part)[2] for norm, h, part in zip(layer.head_norms, (q, k), parts)]
    _rotate(both, layer, state)
    return *parts, v, inverses


def _rotate(x: Tensor, layer: Layer, state: ForwardContext, *, inverse: bool = False) -> None:
    """Rotate the heads of q and k [T, H + H_kv, d] where they are, in layers that rotate; scale q's."""
    if state.cos is not None and state.sin is not None:
        rope_(x, state.cos, state.sin, inverse)
    if state.q_scale is not None:
        x[:, : layer.heads].mul_(state.q_scale)


def _heads(qkv: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """[T, (H + 2 H_kv) d] → views [T, H, d], [T, H_kv, d], [T, H_kv, d]."""
    whole = qkv.unflatten(1, (-1, layer.head_dim))
    q, k, v = whole.split([layer.heads, layer.kv_heads, layer.kv_heads], dim=1)
    return q, k, v


def _rotated(qkv: Tensor, layer: Layer) -> Tensor:
    """The heads that are rotated, q's and k's: a view [T, H + H_kv, d]."""
    return qkv.unflatten(1, (-1, layer.head_dim))[:, : layer.heads + layer.kv_heads]
