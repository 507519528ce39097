"""RMSNorm with a frozen weight (Zhang & Sennrich 2019, arXiv 1910.07467), with the residual's addition before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import Draw, Widths, jit, next_power_of_2, on_device, rows_dense, runs_triton, tl


class Norm(NamedTuple):
    """A frozen RMSNorm.

    Attributes:
        weight: [D]; it receives no gradient.
        eps: added to the mean square.
        offset: multiply by 1 + weight and round once, as Gemma does; else round before multiplying by weight.
    """

    weight: Tensor
    eps: float
    offset: bool = False

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        h: Tensor | None = None,
        copy: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """RMSNorm of x + residual, in one pass.

        Args:
            x: [T, D], or [T, H, D] with each token's heads dense beside each other; any floating dtype.
            residual: [T, D] in x's dtype.
            out: where y is written, of x's shape; tokens may lie any distance apart.
            h, copy: contiguous [T, D] where the sum is written; h may be x. None: h is new, and there is no copy.
        Returns:
            y like x = weight · round(h · inverse), rounded to x's dtype where the Hugging Face layer rounds; h like x, the
            sum rounded to x's dtype (x itself without a residual); inverse [T] or [T, H] in max(float32, x's dtype).
        """
        if not runs_triton("rms_norm", x):
            h = x if residual is None else torch.add(x, residual, out=h)
            if copy is not None:
                copy.copy_(h)
            wide = torch.promote_types(x.dtype, torch.float32)
            norm = torch.linalg.vector_norm(h, dim=-1, dtype=wide)
            inverse = norm.square_().div_(h.shape[-1]).add_(self.eps).rsqrt_()
            normalized = h * inverse[..., None]
            # the Hugging Face layers round the normalized value before they multiply it by the weight; Gemma's afterwards
            if self.offset:
                y = normalized.mul_(self.weight.to(wide) + 1).to(x.dtype)
            else:
                y = normalized.to(x.dtype).mul_(self.weight)
            return y if out is None else out.copy_(y), h, inverse
        x = rows_dense(x)
        other = x if residual is None else rows_dense(residual)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
        if residual is None:
            h = x
        elif h is None:
            h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inverse = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        if y.numel():
            tensors = (x, other, self.weight.contiguous(), y, h, h if copy is None else copy, inverse)
            rows = (x.stride(0), other.stride(0), y.stride(0))
            grid, options = _grid(x)
            options |= {"ADD": residual is not None, "COPY": copy is not None, "OFFSET": self.offset}
            with on_device(x):
                _forward[grid](*tensors, self.eps, *rows, **options)
        return y, h, inverse

    def backward(
        self, grad: Tensor, h: Tensor, inverse: Tensor, residual_grad: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The gradient to h, and so to x and to the residual alike.

        Args:
            grad: the gradient to y, of h's shape.
            h, inverse: as ``forward`` returned them.
            residual_grad: [T, D], what else reaches h; added before the one rounding.
            out: where it is written; may be grad.
        Returns:
            A tensor of h's shape and dtype: `out`, or new.
        """
        if not runs_triton("rms_norm", h):
            # with n = h · inverse: dx = inverse · (w · grad - n · mean(w · grad · n)) = inverse · w · grad - h · inverse² · mean
            wide, scale = inverse.dtype, inverse[..., None]
            weighted = (grad.to(wide) * (self.weight.to(wide) + 1 if self.offset else self.weight)).mul_(scale)
            mean = (weighted * h).sum(-1, keepdim=True).mul_(scale.square()).div_(h.shape[-1])
            weighted.addcmul_(h.to(wide), mean, value=-1)
            if residual_grad is not None:
                weighted.add_(residual_grad)
            return weighted.to(h.dtype) if out is None else out.copy_(weighted)
        grad, h = rows_dense(grad), rows_dense(h)
        other = h if residual_grad is None else rows_dense(residual_grad)
        dx = torch.empty(h.shape, dtype=h.dtype, device=h.device) if out is None else out
        if dx.numel():
            tensors = (grad, h, self.weight.contiguous(), inverse, other, dx)
            rows = (t.stride(0) for t in (grad, h, other, dx))
            grid, options = _grid(h)
            with on_device(h):
                _backward[grid](*tensors, *rows, ADD=residual_grad is not None, OFFSET=self.offset, **options)
        return dx


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool = False) -> Tensor:
    """y = weight · x / sqrt(mean(x²) + eps), over the last dimension.

    Args:
        x: [T, D], any floating dtype; statistics are computed in max(float32, its dtype).
        weight, eps, offset: see ``Norm``.
    Returns:
        [T, D] in x's dtype. Kept for the backward pass: x and one number a row.
    """
    return _RMSNorm.apply(x, Norm(weight, eps, offset))


@jit
def _forward(
    x,
    residual,
    weight,
    y,
    h,
    copy,
    inverse,
    eps,
    x_row,
    residual_row,
    y_row,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    COPY: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """A program takes a row, or a head of one, which stays in registers; everything is read before h is written."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = token * tl.num_programs(1) + head
    column = tl.arange(0, BLOCK)
    there = column < D
    value = tl.load(x + token * x_row + head * D + column, mask=there, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * residual_row + column, mask=there, other=0.0).to(tl.float32)
        rounded = value.to(h.dtype.element_ty)
        tl.store(h + row * D + column, rounded, mask=there)
        if COPY:
            tl.store(copy + row * D + column, rounded, mask=there)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    tl.store(inverse + row, scale)
    factor = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    if OFFSET:
        result = value * scale * (1.0 + factor)
    else:
        result = (value * scale).to(y.dtype.element_ty).to(tl.float32) * factor
    tl.store(y + token * y_row + head * D + column, result.to(y.dtype.element_ty), mask=there)


@jit
def _backward(
    grad,
    h,
    weight,
    inverse,
    residual_grad,
    dx,
    grad_row,
    h_row,
    residual_row,
    dx_row,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """As above; everything is read before anything is written, so dx may lie over grad."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    there = column < D
    at = head * D + column
    scale = tl.load(inverse + token * tl.num_programs(1) + head)
    weighted = tl.load(grad + token * grad_row + at, mask=there, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    weighted *= 1.0 + factor if OFFSET else factor
    normalized = tl.load(h + token * h_row + at, mask=there, other=0.0).to(tl.float32) * scale
    result = (weighted - normalized * (tl.sum(weighted * normalized, 0) / D)) * scale
    if ADD:
        result += tl.load(residual_grad + token * residual_row + at, mask=there, other=0.0).to(tl.float32)
    tl.store(dx + token * dx_row + at, result.to(dx.dtype.element_ty), mask=there)


def _grid(x: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    heads, width = x.shape[1] if x.dim() == 3 else 1, x.shape[-1]
    assert heads == 1 or x.stride(1) == width, f"heads lie at strides {x.stride()}, not dense beside each other"
    block = next_power_of_2(width)
    # 16 values a thread keep a row in registers and its loads at 16 bytes
    options = {"D": width, "BLOCK": block, "num_warps": min(16, max(1, block // 512)), "enable_fp_fusion": True}
    return (x.shape[0], heads), options


def sample(draw: Draw, widths: Widths) -> list[Tensor]:
    """What ``dispatch.check_kernels`` compares."""
    x, residual, grad = (draw(3, widths.hidden) for _ in range(3))
    # of one channel only eps leaves a gradient
    norm = Norm(draw(widths.hidden), 1.0 if widths.hidden == 1 else 1e-5, widths.norm_offset)
    y, h, inverse = norm.forward(x, residual)
    found = [y, h, norm.backward(grad, h, inverse, residual)]
    y, h, inverse = norm.forward(x)
    found += [y, h, inverse, norm.backward(grad, h, inverse)]
    again, copy = x.clone(), torch.empty_like(x)  # the sum over x, and a copy of it
    found += [*norm.forward(again, residual, h=again, copy=copy)[:2], copy]
    if widths.head_norms:  # of a buffer with other values beside them
        heads = widths.rotated
        wide, d_wide = (draw(3, heads + 2, widths.head) for _ in range(2))
        norm, out = Norm(draw(widths.head), 1e-5, norm.offset), wide.clone()
        inverse = norm.forward(wide[:, :heads], out=out[:, :heads])[2]
        norm.backward(d_wide[:, :heads], wide[:, :heads], inverse, out=d_wide[:, :heads])
        found += [inverse, out, d_wide]
    return found


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, norm: Norm) -> Tensor:  # type: ignore[override]
        y, h, inverse = norm.forward(x)
        ctx.norm = norm
        ctx.save_for_backward(h, inverse)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return ctx.norm.backward(grad, *ctx.saved_tensors), None
