"""A decoder layer (Mistral and Llama families) as one function, its backward pass written by hand.

What is kept between the two passes is a decision (``keep``), a token and layer of Mistral-7B in 16 bits:

    input       the layer's input; 8 KB
    attention   and the attention's output, its log-sum-exp, and the residual after it; 24 KB
    all         and q, k, v, gate, up, and the adapters' narrow products; 92 KB and what the adapters need

The rest is computed again from that. No policy computes down_proj again: nothing in the backward pass reads its output.
Norms, rotations and SiLU are computed again under every policy: they cost a pass over memory, and no matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.attention import SegmentTable, attention_backward, attention_forward
from ..ops.lora import Site, grad_adapters, grad_input, grad_low_rank, low_rank, project
from ..ops.rms_norm import rms_norm_backward, rms_norm_forward
from ..ops.rope import rope_
from ..ops.swiglu import swiglu_backward, swiglu_forward
from .memory import Scratch

Keep = Literal["input", "attention", "all"]
QKV, OUT, GATE_UP, DOWN = range(4)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm's weight [D], frozen, and its epsilon."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Layer:
    """What a layer computes with.

    Attributes:
        sites: q, k, v; o; gate, up; down.
        norms: before the attention, before the MLP.
        heads, kv_heads, head_dim: of the attention.
        scale: what its scores are multiplied with.
    """

    sites: tuple[Site, Site, Site, Site]
    norms: tuple[Norm, Norm]
    heads: int
    kv_heads: int
    head_dim: int
    scale: float

    @property
    def trained(self) -> list[Tensor]:
        return [tensor for site in self.sites for tensor in site.trained]


@dataclass(frozen=True)
class Pass:
    """What every layer of one forward pass reads.

    Attributes:
        table: who sees whom.
        cos, sin: [T, head_dim], in the compute dtype.
    """

    table: SegmentTable
    cos: Tensor
    sin: Tensor


def run_layer(x: Tensor, layer: Layer, state: Pass, scratch: Scratch, keep: Keep) -> Tensor:
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
    return _forward(x, layer, state, scratch)[0]


@dataclass
class _Activations:
    """What a forward pass computes that a backward pass may read; None: not computed yet, or not kept.

    Attributes:
        x: [T, D].
        qkv: [T, (H + 2 H_kv) d], rotated.
        mixed, lse: the attention's output [T, H d] and its log-sum-exp.
        middle: [T, D], the residual after the attention.
        gate_up: [T, 2 I].
        products: of each site's adapters.
    """

    x: Tensor
    qkv: Tensor | None = None
    mixed: Tensor | None = None
    lse: Tensor | None = None
    middle: Tensor | None = None
    gate_up: Tensor | None = None
    products: tuple[tuple[Tensor, ...] | None, ...] = (None, None, None, None)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: Layer, state: Pass, scratch: Scratch, keep: Keep, *trained: Tensor) -> Tensor:  # type: ignore[override]
        y, found = _forward(x, layer, state, scratch)
        ctx.layer, ctx.state, ctx.scratch = layer, state, scratch
        ctx.kept = _save(ctx, found, keep)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        found = _restore(ctx)
        owned = found.gate_up is None  # what was kept is autograd's, and must not be overwritten
        _recompute(found, ctx.layer, ctx.state, ctx.scratch)
        d_x, grads = _backward(
            grad.contiguous(), found, ctx.layer, ctx.state, ctx.scratch, owned=owned, need_x=ctx.needs_input_grad[0]
        )
        return (d_x, None, None, None, None, *grads)


def _save(ctx: Any, found: _Activations, keep: Keep) -> tuple[list[str], list[int]]:
    """Hand what the policy keeps to autograd; returns the names, and how many products each site has."""
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
    ctx.save_for_backward(*(getattr(found, name) for name in names), *products)
    return names, counts


def _restore(ctx: Any) -> _Activations:
    names, counts = ctx.kept
    tensors = iter(ctx.saved_tensors)
    kept = {name: next(tensors) for name in names}
    if counts:
        kept["products"] = tuple(tuple(next(tensors) for _ in range(count)) for count in counts)
    return _Activations(**kept)


def _forward(x: Tensor, layer: Layer, state: Pass, scratch: Scratch) -> tuple[Tensor, _Activations]:
    found = _Activations(x)
    normed, _, _ = rms_norm_forward(x, layer.norms[0].weight, layer.norms[0].eps)
    qkv_products = _attend(found, normed, layer, state, scratch)
    del normed
    assert found.mixed is not None
    o_products = low_rank(found.mixed, layer.sites[OUT])
    out = project(found.mixed, _parts(layer, OUT, scratch, x), layer.sites[OUT], o_products)
    normed, found.middle, _ = rms_norm_forward(out, layer.norms[1].weight, layer.norms[1].eps, residual=x)
    del out
    gate_up_products = low_rank(normed, layer.sites[GATE_UP])
    found.gate_up = project(normed, _parts(layer, GATE_UP, scratch, x), layer.sites[GATE_UP], gate_up_products)
    del normed
    act = swiglu_forward(*found.gate_up.chunk(2, dim=1))
    down_products = low_rank(act, layer.sites[DOWN])
    y = project(act, _parts(layer, DOWN, scratch, x), layer.sites[DOWN], down_products, add=found.middle)
    found.products = (qkv_products, o_products, gate_up_products, down_products)
    return y, found


def _attend(
    found: _Activations, normed: Tensor, layer: Layer, state: Pass, scratch: Scratch, *, mix: bool = True
) -> tuple[Tensor, ...]:
    """From the normalized input to q, k, v and (``mix``) the attention's output; returns the adapters' products."""
    products = low_rank(normed, layer.sites[QKV])
    found.qkv = project(normed, _parts(layer, QKV, scratch, normed), layer.sites[QKV], products)
    q, k, v = _heads(found.qkv, layer)
    rope_(_rotated(found.qkv, layer), state.cos, state.sin)
    if mix:
        mixed, found.lse = attention_forward(q, k, v, state.table, layer.scale)
        found.mixed = mixed.flatten(1)
    return products


def _recompute(found: _Activations, layer: Layer, state: Pass, scratch: Scratch) -> None:
    """Fill in what a backward pass reads and the policy did not keep (never down_proj)."""
    qkv_products, o_products, gate_up_products, _ = found.products
    if found.qkv is None:
        normed, _, _ = rms_norm_forward(found.x, layer.norms[0].weight, layer.norms[0].eps)
        qkv_products = _attend(found, normed, layer, state, scratch, mix=found.mixed is None)
        del normed
    assert found.mixed is not None
    if o_products is None:
        o_products = low_rank(found.mixed, layer.sites[OUT])
    normed = None
    if found.middle is None:
        out = project(found.mixed, _parts(layer, OUT, scratch, found.x), layer.sites[OUT], o_products)
        normed, found.middle, _ = rms_norm_forward(out, layer.norms[1].weight, layer.norms[1].eps, residual=found.x)
    if found.gate_up is None:
        if normed is None:
            normed, _, _ = rms_norm_forward(found.middle, layer.norms[1].weight, layer.norms[1].eps)
        gate_up_products = low_rank(normed, layer.sites[GATE_UP])
        parts = _parts(layer, GATE_UP, scratch, found.x)
        found.gate_up = project(normed, parts, layer.sites[GATE_UP], gate_up_products)
    found.products = (qkv_products, o_products, gate_up_products, found.products[DOWN])


def _backward(
    grad: Tensor, found: _Activations, layer: Layer, state: Pass, scratch: Scratch, *, owned: bool, need_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of x and of every trained adapter.

    Args:
        grad: [T, D], of the layer's output.
        owned: whether ``found.gate_up`` may be overwritten.
    """
    qkv, mixed, lse, middle, gate_up = found.qkv, found.mixed, found.lse, found.middle, found.gate_up
    assert qkv is not None and mixed is not None and lse is not None and middle is not None and gate_up is not None
    sites, grads = layer.sites, [[], [], [], []]  # type: tuple[Site, ...], list[list[Tensor]]

    # y = middle + down(silu(gate) · up)
    d_products = grad_low_rank(grad, sites[DOWN])
    d_act = grad_input(grad, _parts(layer, DOWN, scratch, grad), sites[DOWN], d_products)
    d_gate_up = gate_up if owned else torch.empty_like(gate_up)
    (gate, up), (d_gate, d_up) = gate_up.chunk(2, dim=1), d_gate_up.chunk(2, dim=1)
    _, _, act = swiglu_backward(d_act, gate, up, d_gate, d_up, act=d_act)
    if sites[DOWN].trained:
        products = found.products[DOWN]
        products = low_rank(act, sites[DOWN]) if products is None else products
        grads[DOWN] = grad_adapters(grad, act, sites[DOWN], products, d_products)
    del act, d_act, gate, up, d_gate, d_up
    found.gate_up = gate_up = None

    # gate, up = W · norm(middle)
    d_products = grad_low_rank(d_gate_up, sites[GATE_UP])
    d_normed = grad_input(d_gate_up, _parts(layer, GATE_UP, scratch, grad), sites[GATE_UP], d_products)
    normed, _, inverse = rms_norm_forward(middle, layer.norms[1].weight, layer.norms[1].eps)
    if sites[GATE_UP].trained:
        products = found.products[GATE_UP]
        assert products is not None
        grads[GATE_UP] = grad_adapters(d_gate_up, normed, sites[GATE_UP], products, d_products)
    del d_gate_up, normed
    d_middle = rms_norm_backward(d_normed, middle, layer.norms[1].weight, inverse, residual_grad=grad)
    del d_normed, middle

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


def _parts(layer: Layer, site: int, scratch: Scratch, like: Tensor) -> Any:
    return scratch.parts(layer.sites, site, like.dtype)


def _heads(qkv: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """[T, (H + 2 H_kv) d] → views [T, H, d], [T, H_kv, d], [T, H_kv, d]."""
    whole = qkv.unflatten(1, (-1, layer.head_dim))
    q, k, v = whole.split([layer.heads, layer.kv_heads, layer.kv_heads], dim=1)
    return q, k, v


def _rotated(qkv: Tensor, layer: Layer) -> Tensor:
    """The heads that positions turn, q's and k's: a view [T, H + H_kv, d]."""
    return qkv.unflatten(1, (-1, layer.head_dim))[:, : layer.heads + layer.kv_heads]


def layer_of(module: Any, stack_of: Any, dropout_of: Any) -> Layer:
    """Read a Hugging Face decoder layer.

    Args:
        module: a MistralDecoderLayer or LlamaDecoderLayer, its linear layers plain, 4-bit, or wrapped by PEFT.
        stack_of: (linear layer, index of the projection within its site) → the LoraPairs that are on.
        dropout_of: index of the site → its DropoutKey, or None.
    """
    attention, mlp = module.self_attn, module.mlp
    modules: Sequence[tuple[Any, ...]] = (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
    sites = []
    for place, linears in enumerate(modules):
        inner = [m.get_base_layer() if hasattr(m, "get_base_layer") else m for m in linears]
        sites.append(
            Site(
                tuple(m.weight for m in inner),
                tuple(m.bias for m in inner),
                tuple(m.out_features for m in inner),
                tuple(pair for index, m in enumerate(linears) for pair in stack_of(m, index)),
                dropout_of(place),
            )
        )
    norms = (module.input_layernorm, module.post_attention_layernorm)
    head_dim = attention.head_dim
    return Layer(
        (sites[0], sites[1], sites[2], sites[3]),
        (Norm(norms[0].weight, norms[0].variance_epsilon), Norm(norms[1].weight, norms[1].variance_epsilon)),
        sites[0].outs[0] // head_dim,
        sites[0].outs[1] // head_dim,
        head_dim,
        attention.scaling,
    )
