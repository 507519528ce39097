"""Log-probabilities of target tokens, the one primitive of every loss, without ever holding [N, vocabulary]."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from .dispatch import Draw, Widths, jit, next_power_of_2, on_device, runs_triton, tl

# The logits of one chunk, in bytes of the dtype that the softmax is computed in. Small enough for a processor's
# outer caches to help, large enough for the product to run at full speed: on a GPU that takes four times as many rows.
CHUNK_BYTES = 64 * 2**20


class TokenStats(NamedTuple):
    """Of the same pass: what the metrics want.

    Attributes:
        entropy: [N], of each target's distribution, in nats.
        correct: [N] bool, whether no other token is likelier than the target.
    """

    entropy: Tensor
    correct: Tensor


@overload
def token_logps(hidden: Tensor, head: Tensor, targets: Tensor, stats: Literal[False] = False) -> Tensor: ...
@overload
def token_logps(hidden: Tensor, head: Tensor, targets: Tensor, stats: Literal[True]) -> tuple[Tensor, TokenStats]: ...
def token_logps(
    hidden: Tensor, head: Tensor, targets: Tensor, stats: bool = False
) -> Tensor | tuple[Tensor, TokenStats]:
    """log softmax(hidden · headᵀ)[target], target by target.

    Args:
        hidden: [N, D], the hidden states that predict, in any floating dtype.
        head: [V, D], frozen: no gradient, and no buffer for one.
        targets: [N] int64.
        stats: give entropy and top-1 of the same logits too.
    Returns:
        [N] float32 (float64 for float64 inputs); with `stats`, that and the (not differentiable) ``TokenStats``.

    The gradient is a number a target times a row that the forward pass already knows (the target's embedding minus
    the expected one), so that row is computed while the chunk's probabilities are at hand: two products instead of
    the three that recomputing the logits takes. What is kept is that row, [N, D] in hidden's dtype.
    """
    logps, entropy, correct = _TokenLogps.apply(hidden, head, targets, stats)
    return (logps, TokenStats(entropy, correct)) if stats else logps


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Chunk(NamedTuple):
    """What becomes of the logits [n, V] of one chunk.

    Attributes:
        logps, entropy: [n], float32 or float64; entropy is None where it was not asked for.
        correct: [n] bool, or None.
        weights: [n, V] in the logits' dtype, the softmax times `divisor`, or None.
        divisor: [n, 1], or 1.
    """

    logps: Tensor
    entropy: Tensor | None
    correct: Tensor | None
    weights: Tensor | None
    divisor: Tensor | float


# In float16 a probability under 6e-5 loses digits, and a flat distribution over 32,000 tokens has only such. So a row is
# scaled up until its largest weight is 1, but no further than this: the product with the head must stay in range.
_LIMIT = {torch.float16: 1024.0}


# On a CPU the softmax goes a few rows at a time, which stay in its caches from one step to the next.
_CACHED_BYTES = 2 * 2**20


def _twin(logits: Tensor, targets: Tensor, stats: bool, write: bool) -> _Chunk:
    """The softmax of a chunk; overwrites `logits`."""
    rows = logits.shape[0]
    if logits.device.type == "cpu":
        rows = max(1, min(rows, _CACHED_BYTES // (logits.shape[1] * _wide(logits.dtype).itemsize)))
    pieces = [_twin_rows(*piece, stats, write) for piece in zip(logits.split(rows), targets.split(rows))]
    logps, entropy, correct, divisor = zip(*pieces)
    return _Chunk(
        torch.cat(logps),
        torch.cat(entropy) if stats else None,
        torch.cat(correct) if stats else None,
        logits if write else None,
        1.0 if divisor[0] is None else torch.cat(divisor),
    )


def _twin_rows(
    logits: Tensor, targets: Tensor, stats: bool, write: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """logps, entropy, correct and divisor of some rows, whose weights are left in `logits`."""
    kind, shifted = logits.dtype, logits.to(_wide(logits.dtype))
    target = shifted.gather(1, targets[:, None])
    top = shifted.amax(-1, keepdim=True)
    shifted = shifted.sub_(top)
    weights = shifted.exp() if stats else shifted.exp_()
    total = weights.sum(-1, keepdim=True)
    log_total = total.log()
    entropy = (log_total - shifted.mul_(weights).sum(-1, keepdim=True) / total)[:, 0] if stats else None
    correct = (target >= top)[:, 0] if stats else None
    logps = (target - top - log_total)[:, 0]
    if not write:
        return logps, entropy, correct, None
    if kind == weights.dtype:  # dividing by the total is left for the product, which is narrower
        divisor = total
    else:
        divisor = total.clamp(max=_LIMIT[kind]) if kind in _LIMIT else None
        weights.mul_(1 / total if divisor is None else divisor / total)
    if weights.data_ptr() != logits.data_ptr():
        logits.copy_(weights)
    return logps, entropy, correct, divisor


@jit
def _softmax(
    logits,
    targets,
    logps,
    entropy,
    correct,
    divisors,
    row_stride,
    limit,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    STATS: tl.constexpr,
    WRITE: tl.constexpr,
):
    """A program takes a row. One that fits in a block stays in registers; a longer one is read twice."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(logits + tl.load(targets + row)).to(tl.float32)
    column = tl.arange(0, BLOCK)
    if V <= BLOCK:
        there = column < V
        value = tl.load(logits + column, mask=there, other=float("-inf")).to(tl.float32)
        top = tl.max(value, 0)
        weight = tl.exp(value - top)
        total = tl.sum(weight, 0)
        inner = 0.0  # Σ exp(l - top) (l - top), for the entropy
        if STATS:
            inner = tl.sum(weight * tl.where(there, value - top, 0.0), 0)
    else:
        # finite, so that the first rescaling is 0 · something and no NaN
        top = -1.0e38
        total = 0.0
        inner = 0.0
        for start in range(0, V, BLOCK):
            there = start + column < V
            value = tl.load(logits + start + column, mask=there, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(value, 0))
            shrink = tl.exp(top - higher)
            weight = tl.exp(value - higher)
            if STATS:
                shifted = tl.where(there, value - higher, 0.0)
                inner = (inner + total * (top - higher)) * shrink + tl.sum(weight * shifted, 0)
            total = total * shrink + tl.sum(weight, 0)
            top = higher
    log_total = tl.log(total)
    tl.store(logps + row, target - top - log_total)
    if STATS:
        tl.store(entropy + row, log_total - inner / total)
        tl.store(correct + row, target >= top)
    if WRITE:
        divisor = tl.minimum(total, limit)
        tl.store(divisors + row, divisor)
        scale = divisor / total
        if V <= BLOCK:
            tl.store(logits + column, (weight * scale).to(logits.dtype.element_ty), mask=column < V)
        else:
            for start in range(0, V, BLOCK):
                there = start + column < V
                value = tl.load(logits + start + column, mask=there, other=float("-inf")).to(tl.float32)
                weight = tl.exp(value - top) * scale
                tl.store(logits + start + column, weight.to(logits.dtype.element_ty), mask=there)


def _kernel(logits: Tensor, targets: Tensor, stats: bool, write: bool) -> _Chunk:
    """As the twin; the weights are `logits`, overwritten."""
    count, vocabulary = logits.shape
    logps = logits.new_empty(count, dtype=torch.float32)
    entropy = torch.empty_like(logps) if stats else None
    correct = torch.empty_like(logps, dtype=torch.bool) if stats else None
    limit = _LIMIT.get(logits.dtype, 1.0)
    divisor = torch.empty_like(logps)
    # 32 values a thread is what 1024 threads have registers for
    block = next_power_of_2(vocabulary) if vocabulary <= 2**15 else 2**13
    if count:
        with on_device(logits):
            _softmax[(count,)](
                logits,
                targets,
                logps,
                logps if entropy is None else entropy,
                logps if correct is None else correct,
                divisor,
                logits.stride(0),
                limit,
                V=vocabulary,
                BLOCK=block,
                STATS=stats,
                WRITE=write,
                num_warps=32 if block == 2**15 else min(16, max(1, block // 512)),
                enable_fp_fusion=True,
            )
    return _Chunk(logps, entropy, correct, logits if write else None, divisor[:, None] if limit > 1 else 1.0)


def sample(draw: Draw, widths: Widths) -> list[Tensor]:
    """What ``dispatch.check_kernels`` compares; each choice of stats and weights is a kernel of its own."""
    found = []
    for spread in (2, 2**13):
        logits = draw(3, widths.vocabulary) * spread
        targets = torch.arange(3, device=logits.device) * 7 % widths.vocabulary
        targets[-1] = logits[-1].argmax()
        run = _kernel if runs_triton("token_logps", logits) else _twin
        for stats in (False, True):
            for write in (False, True):
                logps, entropy, correct, weights, divisor = run(logits.clone(), targets, stats, write)
                softmax = None if weights is None else (weights / divisor).to(logits.dtype)
                found += [result for result in (logps, entropy, correct, softmax) if result is not None]
    return found


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, stats: bool):  # type: ignore[override]
        head = head.detach().to(hidden.dtype)
        count, vocabulary = hidden.shape[0], head.shape[0]
        wide = _wide(hidden.dtype)
        logps = hidden.new_empty(count, dtype=wide)
        entropy = hidden.new_empty(count, dtype=wide) if stats else None
        correct = hidden.new_empty(count, dtype=torch.bool) if stats else None
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        room = 4 * CHUNK_BYTES if hidden.is_cuda else CHUNK_BYTES
        size = max(1, min(count, room // (vocabulary * wide.itemsize)))
        if hidden.is_cuda and size < count:
            size -= size % 128 if size > 128 else 0  # whole tiles of a matrix product
        # one buffer for all chunks: new pages cost a CPU a tenth of the product
        buffer = hidden.new_empty(size, vocabulary)
        run = _kernel if runs_triton("token_logps", hidden) else _twin
        for start in range(0, count, size):
            here = slice(start, min(start + size, count))
            ids = targets[here]
            logits = torch.mm(hidden[here], head.T, out=buffer[: ids.shape[0]])
            chunk = run(logits, ids, stats, slope is not None)
            logps[here] = chunk.logps
            if entropy is not None and correct is not None:
                entropy[here], correct[here] = chunk.entropy, chunk.correct
            if slope is not None:
                expected = chunk.weights @ head
                if isinstance(chunk.divisor, Tensor):
                    expected.div_(chunk.divisor)
                torch.sub(head[ids], expected, out=slope[here])
        ctx.save_for_backward(*([slope] if slope is not None else []))
        if stats:
            ctx.mark_non_differentiable(entropy, correct)
        return logps, entropy, correct

    @staticmethod
    def backward(ctx, grad: Tensor, *_: None):  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        # computed in grad's float32, rounded once
        return torch.mul(slope, grad[:, None], out=torch.empty_like(slope)), None, None, None
