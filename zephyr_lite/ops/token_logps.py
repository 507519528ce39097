"""Log-probabilities of target tokens, the one primitive of every loss, without ever holding [N, vocabulary]."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

# The logits of one chunk, in bytes of the dtype that the softmax is computed in. Small enough for a processor's
# outer caches to help, large enough for the product to run at full speed.
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


def token_stats(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, TokenStats]:
    """As ``token_logps`` with its statistics, without a gradient."""
    with torch.no_grad():
        return token_logps(hidden, head, targets, stats=True)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Chunk(NamedTuple):
    """What becomes of the logits [n, V] of one chunk.

    Attributes:
        logps, entropy: [n], float32 or float64; entropy is None where it was not asked for.
        correct: [n] bool, or None.
        weights: [n, V] in the logits' dtype, the softmax times `factor`, or None.
        factor: [n, 1], or one number.
    """

    logps: Tensor
    entropy: Tensor | None
    correct: Tensor | None
    weights: Tensor | None
    factor: Tensor | float


# In float16 a probability under 6e-5 loses digits, and a flat distribution over 32,000 tokens has only such: scaled by
# a power of two, which is divided out of the expected embedding exactly.
_FACTOR = {torch.float16: 1024.0}


def _twin(logits: Tensor, targets: Tensor, stats: bool, write: bool) -> _Chunk:
    """The softmax of a chunk; overwrites `logits`."""
    kind, logits = logits.dtype, logits.to(_wide(logits.dtype))
    target = logits.gather(1, targets[:, None])
    top = logits.amax(-1, keepdim=True)
    shifted = logits.sub_(top)
    weights = shifted.exp() if stats else shifted.exp_()
    total = weights.sum(-1, keepdim=True)
    log_total = total.log()
    entropy = (log_total - shifted.mul_(weights).sum(-1, keepdim=True) / total)[:, 0] if stats else None
    correct = (target >= top)[:, 0] if stats else None
    logps = (target - top - log_total)[:, 0]
    if not write:
        return _Chunk(logps, entropy, correct, None, 1.0)
    if kind == weights.dtype:  # dividing by the total is left for the product, which is narrower
        return _Chunk(logps, entropy, correct, weights, total)
    factor = _FACTOR.get(kind, 1.0)
    return _Chunk(logps, entropy, correct, weights.mul_(factor / total).to(kind), factor)


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
        size = max(1, min(count, CHUNK_BYTES // (vocabulary * wide.itemsize)))
        # one buffer for all chunks: new pages cost a CPU a tenth of the product
        buffer = hidden.new_empty(size, vocabulary)
        for start in range(0, count, size):
            here = slice(start, min(start + size, count))
            ids = targets[here]
            logits = torch.mm(hidden[here], head.T, out=buffer[: ids.shape[0]])
            chunk = _twin(logits, ids, stats, slope is not None)
            logps[here] = chunk.logps
            if entropy is not None and correct is not None:
                entropy[here], correct[here] = chunk.entropy, chunk.correct
            if slope is not None:
                expected = (chunk.weights @ head).div_(chunk.factor)
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
