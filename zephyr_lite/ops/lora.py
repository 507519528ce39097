"""Frozen projections that read one input, with a stack of low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685).

    y_j = x W_jᵀ + b_j + Σ_i s_i (x A_ijᵀ) B_ijᵀ

for the projections j of one site (q, k, v; or gate, up; or o; or down) and the adapters i of the stack. All A's
that read the same x are one product. An adapter that is switched off keeps its columns of that product, set to
zero: the shapes, and so the rounding, are those of the adapter switched on, and a reference equals its policy to
the bit as long as B is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dropout import DropoutKey, dropout_mask, dropped
from .nf4 import dequantize


@dataclass(frozen=True)
class LoraPair:
    """One adapter on one projection.

    Attributes:
        projection: index of the projection within the site.
        a, b: [r, in] and [out, r], float32 master weights (float64 in tests).
        scale: alpha / r, or alpha / sqrt(r) for rank-stabilized adapters.
        off: keep the columns, but set them to zero.
        dropout: whether the site's dropout applies to this adapter's input.
    """

    projection: int
    a: Tensor
    b: Tensor
    scale: float
    off: bool = False
    dropout: bool = False


def lora_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stack: Sequence[LoraPair],
    dropout: DropoutKey | None = None,
) -> tuple[Tensor, ...]:
    """All projections of one site.

    Args:
        x: [T, in].
        weights: one [out_j, in] a projection, plain or NF4; frozen.
        biases: [out_j] or None a projection; frozen.
        stack: the adapters, in order; gradients go to those whose a and b require them, in float32.
        dropout: for the adapters marked with ``dropout``; None or p = 0 means none.
    Returns:
        [T, out_j] a projection, in x's dtype. Kept for the backward pass: x, and r numbers a token and adapter.
    """
    if dropout is not None and dropout.p == 0:
        dropout = None
    tensors = [tensor for pair in stack for tensor in (pair.a, pair.b)]
    return _LoraLinear.apply(x, tuple(weights), tuple(biases), tuple(stack), dropout, *tensors)


def _stacked(pairs: list[LoraPair], dtype: torch.dtype) -> Tensor:
    return torch.cat([pair.a.detach().to(dtype) for pair in pairs])


def _columns(pairs: list[LoraPair]) -> dict[int, slice]:
    """Where each pair's columns lie in the product, by the pair's place in the list."""
    result, start = {}, 0
    for place, pair in enumerate(pairs):
        result[place] = slice(start, start + pair.a.shape[0])
        start += pair.a.shape[0]
    return result


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, biases, stack, dropout, *tensors):  # type: ignore[override]
        outputs = []
        for weight, bias in zip(weights, biases):
            y = x @ dequantize(weight, x.dtype).T
            outputs.append(y if bias is None else y.add_(bias.to(x.dtype)))
        groups = []  # (whether there is dropout, pairs); the adapters with dropout have an input of their own
        for drop in (False, True):
            pairs = [p for p in stack if (p.dropout and dropout is not None) == drop]
            if pairs:
                groups.append((drop, pairs))
        products = []
        for drop, pairs in groups:
            a = _stacked(pairs, x.dtype)
            # dropout's factor 1 / (1 - p) goes to the product, which is narrow
            if all(pair.off for pair in pairs):
                product = x.new_zeros(x.shape[0], a.shape[0])
            elif drop:
                product = (dropped(x, dropout_mask(dropout, x.shape[1])) @ a.T).div_(1 - dropout.p)
            else:
                product = x @ a.T
            for place, columns in _columns(pairs).items():
                if pairs[place].off:
                    product[:, columns] = 0
            # sorted by projection, one addmm a projection and group
            for j, y in enumerate(outputs):
                places = [place for place, p in enumerate(pairs) if p.projection == j]
                if places:
                    z, b = _gather(product, pairs, places, x.dtype)
                    y.addmm_(z, b.T)
            products.append(product)
        ctx.save_for_backward(x, *products, *tensors)
        ctx.meta = (weights, stack, dropout, groups)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[override]
        weights, stack, dropout, groups = ctx.meta
        x, *rest = ctx.saved_tensors
        products = rest[: len(groups)]
        grads = tuple(g.contiguous() for g in grads)
        need_x = ctx.needs_input_grad[0]
        grad_x = None
        if need_x:
            for weight, grad in zip(weights, grads):
                w = dequantize(weight, x.dtype)
                grad_x = grad @ w if grad_x is None else grad_x.addmm_(grad, w)
        # by place in the stack; the same object may not stand there twice
        by_pair: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        for (drop, pairs), product in zip(groups, products):
            mask = dropout_mask(dropout, x.shape[1]) if drop else None
            trainable = [p.a.requires_grad and not p.off for p in pairs]
            if not need_x and not any(trainable):
                continue
            grad_product = torch.zeros_like(product)
            for place, columns in _columns(pairs).items():
                pair = pairs[place]
                if pair.off or not (need_x or trainable[place]):
                    continue
                grad = grads[pair.projection]
                grad_product[:, columns] = grad @ (pair.b.detach() * pair.scale).to(x.dtype)
                if trainable[place]:
                    grad_b = (grad.T @ product[:, columns]).to(pair.b.dtype)
                    by_pair[id(pair)] = (None, grad_b.mul_(pair.scale))
            source = x if mask is None else dropped(x, mask)
            if mask is not None:
                grad_product.div_(1 - dropout.p)
            for place, columns in _columns(pairs).items():
                pair = pairs[place]
                if trainable[place]:
                    grad_a = (grad_product[:, columns].T @ source).to(pair.a.dtype)
                    by_pair[id(pair)] = (grad_a, by_pair[id(pair)][1])
            if grad_x is not None:
                a = _stacked(pairs, x.dtype)
                if mask is None:
                    grad_x.addmm_(grad_product, a)
                else:
                    grad_x.add_(dropped(grad_product @ a, mask, inplace=True))
        adapter_grads = [g for pair in stack for g in by_pair.get(id(pair), (None, None))]
        return (grad_x, None, None, None, None, *adapter_grads)


def _gather(product: Tensor, pairs: list[LoraPair], places: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The columns of the product that one projection reads, and its scaled B's beside each other."""
    columns = _columns(pairs)
    z = torch.cat([product[:, columns[place]] for place in places], dim=1)
    b = torch.cat([(pairs[place].b.detach() * pairs[place].scale).to(dtype) for place in places], dim=1)
    return z, b
