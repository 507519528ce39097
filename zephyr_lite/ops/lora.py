"""Frozen projections that read one input, with a stack of low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685).

    y_j = x W_jᵀ + b_j + Σ_i s_i (x A_ijᵀ) B_ijᵀ

for the projections j of one site (q, k, v; or gate, up; or o; or down) and the adapters i of the stack. All A's
that read the same x are one product z = x Aᵀ; an adapter with dropout has an input, and so a product, of its own. An
adapter that is switched off keeps its columns of the product, set to zero: the shapes, and so the rounding, are those
of the adapter switched on, and a reference equals its policy to the bit as long as B is zero.

Forward and backward are separate functions, because the decoder layer decides what is kept between them. They read the
adapters in the compute dtype, as ``cast_adapters`` gives them for one pass of a layer. The frozen matrices come in parts,
an iterable of (first column of y, W): one part where a site's matrices lie beside each other. In int8 (``LinearGroup.int8``) it
is an ``Int8Matrix`` a projection, transposed for ``grad_input``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from .dropout import DropoutKey
from .dropout_products import add_input_gradient_, dropped_product, matrix_gradient, wide_mm
from .int8 import OutlierChannels, int8_mm, quantize_rows

Parts = Iterable[tuple[int, Any]]
# bitsandbytes' 8-bit optimizers scale blocks of 256 numbers, to which an adapter's matrices are aligned in its buffer, and
# keep 32 bits for tensors of less than 4,096
ALIGNMENT, SMALL = 256, 4096


@dataclass(frozen=True)
class LoraPair:
    """One adapter on one projection.

    Attributes:
        projection: index of the projection within the site.
        a, b: [r, in] and [out, r], float32 master weights (float64 in tests; whatever a foreign trainer has).
        scale: alpha / r, or alpha / sqrt(r) for rank-stabilized adapters.
        off: keep the columns, but set them to zero.
        dropout: whether the site's dropout applies to this adapter's input.
        cast: a and scale · b in the compute dtype, from ``cast_adapters``; None: not made, or not needed.
    """

    projection: int
    a: Tensor
    b: Tensor
    scale: float
    off: bool = False
    dropout: bool = False
    cast: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class _Group:
    """Adapters of a site that read the same input: their A's are one product.

    Attributes:
        dropout: of the input, or None.
        pairs: the adapters and their columns of the product, sorted by projection.
        trained: those of them that are trained.
        blocks: (projection, its columns, its adapters), for each projection that an adapter reaches.
        rank: columns of the product.
        off: whether all adapters are switched off.
    """

    dropout: DropoutKey | None
    pairs: list[tuple[LoraPair, slice]]
    trained: list[tuple[LoraPair, slice]]
    blocks: list[tuple[int, slice, list[LoraPair]]]
    rank: int
    off: bool

    def a(self) -> Tensor:
        """[R, in]: a view where the A's follow each other in memory, else a copy."""
        parts = [_cast(pair)[0] for pair, _ in self.pairs]
        for before, after in pairwise(parts):
            if _gap(before, after) != 0:
                return torch.cat(parts)
        return parts[0].as_strided((self.rank, parts[0].shape[1]), parts[0].stride())


@dataclass(frozen=True)
class Int8Site:
    """What the int8 products of a site's frozen matrices need beside them; the same for the whole run.

    Attributes:
        outliers: the channels of x that stay in the compute dtype.
        scales: float32 scales of each matrix: of its rows, and of its columns, which are the rows in the backward pass.
    """

    outliers: OutlierChannels
    scales: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class LinearGroup:
    """Projections that read the same input.

    Attributes:
        weights: one frozen [out_j, in] matrix a projection, plain or NF4.
        biases: [out_j] or None a projection; frozen.
        outs: out_j.
        stack: the adapters.
        dropout: for the adapters marked with ``dropout``; None: there is none.
        int8: the matrices' products are in int8; None: in the compute dtype.
        peaks: [in], which ``project`` raises to the largest absolute value of each channel of x; None: it does not.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    outs: tuple[int, ...]
    stack: tuple[LoraPair, ...]
    dropout: DropoutKey | None = None
    int8: Int8Site | None = None
    peaks: Tensor | None = None

    @cached_property
    def groups(self) -> list[_Group]:
        """The adapters without dropout and those with it, where there are any."""
        found = []
        for dropped in (False, True):
            pairs: list[tuple[LoraPair, slice]] = []
            blocks: list[tuple[int, slice, list[LoraPair]]] = []
            end = 0
            for projection in range(len(self.outs)):
                start, of_projection = end, []
                for pair in self.stack:
                    if pair.projection == projection and (pair.dropout and self.dropout is not None) == dropped:
                        of_projection.append(pair)
                        pairs.append((pair, slice(end, end + pair.a.shape[0])))
                        end += pair.a.shape[0]
                if of_projection:
                    blocks.append((projection, slice(start, end), of_projection))
            if pairs:
                trained = [p for p in pairs if (p[0].a.requires_grad or p[0].b.requires_grad) and not p[0].off]
                off = all(pair.off for pair, _ in pairs)
                found.append(_Group(self.dropout if dropped else None, pairs, trained, blocks, end, off))
        return found

    @cached_property
    def slices(self) -> list[slice]:
        """Where each projection's columns of y are."""
        return [slice(*ends) for ends in pairwise(accumulate(self.outs, initial=0))]

    def rows(self, rows: slice) -> LinearGroup:
        """For some of the tokens: only dropout knows which they are."""
        return self if self.dropout is None else replace(self, dropout=self.dropout.rows(rows))

    @property
    def trained(self) -> list[Tensor]:
        """a and b of every trained pair, in the order in which ``grad_adapters`` returns their gradients."""
        return [matrix for group in self.groups for pair, _ in group.trained for matrix in (pair.a, pair.b)]


def cast_adapters(sites: Sequence[LinearGroup], dtype: torch.dtype) -> tuple[LinearGroup, ...]:
    """The sites with copies of A and s B in the compute dtype, but for groups that are off. What needs neither a cast nor a
    scale is not copied."""
    pairs = [pair for site in sites for group in site.groups if not group.off for pair, _ in group.pairs]
    of_a = _copies([(pair.a.detach(), 1.0) for pair in pairs], dtype)
    of_b = _copies([(pair.b.detach(), pair.scale) for pair in pairs], dtype)
    casts = dict(zip(map(id, pairs), zip(of_a, of_b)))
    return tuple(replace(site, stack=tuple(replace(p, cast=casts.get(id(p))) for p in site.stack)) for site in sites)


def _copies(matrices: Sequence[tuple[Tensor, float]], dtype: torch.dtype) -> list[Tensor]:
    """scale · matrix, scaled in the matrix's own dtype, then rounded: one launch for all that follow each other in memory
    and have the same scale, as those of one adapter do (``AdapterStack``)."""
    places = [(m.untyped_storage()._cdata, m.storage_offset()) for m, _ in matrices]
    runs: list[list[int]] = []
    for index in sorted(range(len(matrices)), key=places.__getitem__):
        matrix, scale = matrices[index]
        before, scale_before = matrices[runs[-1][-1]] if runs else (None, scale)
        if before is None or scale != scale_before or not 0 <= _gap(before, matrix) < ALIGNMENT:
            runs.append([])
        runs[-1].append(index)
    copies = [matrix for matrix, _ in matrices]
    for run in runs:
        (first, scale), (last, _) = matrices[run[0]], matrices[run[-1]]
        start = first.storage_offset()
        whole = first.as_strided((last.storage_offset() + last.numel() - start,), (1,))
        if scale == 1:
            whole = whole.to(dtype)
        else:
            whole = torch.mul(whole, scale, out=torch.empty(whole.shape, dtype=dtype, device=whole.device))
        for index in run:
            matrix = matrices[index][0]
            offset = matrix.storage_offset() - start + whole.storage_offset()
            copies[index] = whole.as_strided(matrix.shape, matrix.stride(), offset)
    return copies


def _gap(a: Tensor, b: Tensor) -> int:
    """Numbers between the end of a and the beginning of b, which is negative if they are not in one storage in this order."""
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return -1
    return b.storage_offset() - a.storage_offset() - a.numel()


def low_rank(x: Tensor, site: LinearGroup) -> tuple[Tensor, ...]:
    """z = x Aᵀ, [T, R] a group of adapters, with dropout where the group has it. None is computed of adapters that are
    all switched off: their columns are zero, and adding zero changes no bit."""
    products = []
    for group in site.groups:
        if group.off:
            products.append(x.new_empty(0, group.rank))
            continue
        a = group.a()
        product = x @ a.T if group.dropout is None else dropped_product(x, a, group.dropout)
        for pair, columns in group.pairs:
            if pair.off:
                product[:, columns] = 0
        products.append(product)
    return tuple(products)


def project(
    x: Tensor,
    parts: Parts,
    site: LinearGroup,
    products: Sequence[Tensor],
    *,
    add: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """y of all projections beside each other.

    Args:
        x: [T, in].
        parts: the frozen matrices in x's dtype.
        products: of ``low_rank``.
        add: add to what `out` holds (a residual).
        out: where the result goes.
    Returns:
        [T, Σ out] in x's dtype: `out`, or a new tensor.
    """
    y = torch.empty(x.shape[0], sum(site.outs), dtype=x.dtype, device=x.device) if out is None else out
    if site.peaks is not None:
        torch.maximum(site.peaks, x.abs().amax(0), out=site.peaks)
    on = [pair for pair in zip(site.groups, products) if not pair[0].off]
    if site.int8 is None:
        for start, weight in parts:
            columns = slice(start, start + weight.shape[0])
            if add:
                y[:, columns].addmm_(x, weight.T)
            else:
                torch.mm(x, weight.T, out=y[:, columns])
    else:
        # a product takes the adapters of one group along
        along = {}
        if on:
            group, product = on.pop(0)
            along = {place: (product[:, columns], _scaled_b(pairs)) for place, columns, pairs in group.blocks}
        codes = quantize_rows(x, site.int8.outliers)
        for place, (start, weight) in enumerate(parts):
            int8_mm(codes, weight, y[:, start : start + len(weight.codes)], along.get(place), add=add)
    for bias, columns in zip(site.biases, site.slices):
        if bias is not None:
            y[:, columns] += bias.to(x.dtype)
    for group, product in on:
        for projection, columns, pairs in group.blocks:
            y[:, site.slices[projection]].addmm_(product[:, columns], _scaled_b(pairs).T)
    return y


def grad_low_rank(grad: Tensor, site: LinearGroup, *, need_all: bool = True) -> tuple[Tensor, ...]:
    """The gradients of the products: [T, R] a group, zero in the columns of what is switched off.

    Args:
        grad: [T, Σ out].
        need_all: False where no gradient of x is wanted: a group without a trained adapter is left out then.
    """
    result = []
    for group in site.groups:
        if group.off or not (need_all or group.trained):
            result.append(grad.new_empty(0, group.rank))
            continue
        d_product = grad.new_empty(grad.shape[0], group.rank)
        for projection, columns, pairs in group.blocks:
            d_y = grad[:, site.slices[projection]]
            torch.mm(d_y, _scaled_b(pairs), out=d_product[:, columns])
        for pair, columns in group.pairs:
            if pair.off:
                d_product[:, columns] = 0
        result.append(d_product)
    return tuple(result)


def grad_input(grad: Tensor, parts: Parts, site: LinearGroup, d_products: Sequence[Tensor]) -> Tensor:
    """The gradient of x: [T, in], a new tensor.

    Args:
        grad: [T, Σ out].
        parts: as in ``project``.
        d_products: of ``grad_low_rank``.
    """
    result = None
    on = [pair for pair in zip(site.groups, d_products) if not pair[0].off]
    if site.int8 is None:
        for start, weight in parts:
            d_y = grad[:, start : start + weight.shape[0]]
            result = d_y @ weight if result is None else result.addmm_(d_y, weight)
    else:
        along = None
        if on and on[0][0].dropout is None:
            group, d_product = on.pop(0)
            along = d_product, group.a().T
        for start, weight in parts:
            codes = quantize_rows(grad[:, start : start + weight.codes.shape[1]])
            if result is None:
                result = int8_mm(codes, weight, grad.new_empty(len(grad), len(weight.codes)), along)
            else:
                int8_mm(codes, weight, result, add=True)
    assert result is not None
    for group, d_product in on:
        a = group.a()
        if group.dropout is None:
            result.addmm_(d_product, a)
        else:
            add_input_gradient_(result, d_product, a, group.dropout)
    return result


def grad_adapters(
    grad: Tensor, x: Tensor, site: LinearGroup, products: Sequence[Tensor], d_products: Sequence[Tensor]
) -> list[Tensor]:
    """The gradients of every trained a and b, in the order of ``site.trained``, each in its parameter's dtype; computed
    in float32 where x has 16 bits."""
    result: list[Tensor] = []
    for group, product, d_product in zip(site.groups, products, d_products):
        if not group.trained:
            continue
        if len(group.trained) < len(group.pairs):
            d_product = torch.cat([d_product[:, columns] for _, columns in group.trained], dim=1)
        if group.dropout is None:
            d_a = wide_mm(d_product.T, x)
        else:
            d_a = matrix_gradient(d_product, x, group.dropout)
        start = 0
        for pair, columns in group.trained:
            rank = pair.a.shape[0]
            d_b = wide_mm(grad[:, site.slices[pair.projection]].T, product[:, columns])
            if pair.scale != 1:
                d_b.mul_(pair.scale)
            result += [d_a[start : start + rank].to(pair.a.dtype), d_b.to(pair.b.dtype)]
            start += rank
    return result


def _cast(pair: LoraPair) -> tuple[Tensor, Tensor]:
    assert pair.cast is not None, "cast_adapters comes first"
    return pair.cast


def _scaled_b(pairs: Sequence[LoraPair]) -> Tensor:
    """s B of adapters on one projection beside each other: [out, Σ r]."""
    parts = [_cast(pair)[1] for pair in pairs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
