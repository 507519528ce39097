"""Log-probabilities of target tokens, the one primitive of every loss, without ever holding [N, vocabulary]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The logits of one chunk, in bytes of the dtype that the softmax is computed in. Small enough for a processor's
# outer caches to help, large enough for the product to run at full speed.
CHUNK_BYTES = 64 * 2**20


class TokenStats(NamedTuple):
    """Of the same pass: what the metrics want.

    Attributes:
        entropy: [N], of each target's distribution, in nats.
        correct: [N] bool, whether the target is the most likely token.
    """

    entropy: Tensor
    correct: Tensor


def token_logps(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden · headᵀ)[target], target by target.

    Args:
        hidden: [N, D], the hidden states that predict, in any floating dtype.
        head: [V, D], frozen: no gradient, and no buffer for one.
        targets: [N] int64.
    Returns:
        [N] float32 (float64 for float64 inputs).

    The gradient is a number a target times a row that the forward pass already knows (the target's embedding minus
    the expected one), so that row is computed while the chunk's probabilities are at hand: two products instead of
    the three that recomputing the logits takes. What is kept is [N, D], in float32.
    """
    return _TokenLogps.apply(hidden, head, targets)


def token_stats(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, TokenStats]:
    """As ``token_logps``, without a gradient, with the entropy and whether the target was the likeliest token."""
    logps, entropy, correct = [], [], []
    with torch.no_grad():
        for rows, ids in _chunks(hidden, head, targets):
            logprobs = _wide(rows @ head.T.to(rows.dtype)).log_softmax(-1)
            logps.append(logprobs.gather(1, ids[:, None])[:, 0])
            correct.append(logprobs.argmax(-1) == ids)
            entropy.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.cat(logps), TokenStats(torch.cat(entropy), torch.cat(correct))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _chunks(hidden: Tensor, head: Tensor, targets: Tensor):
    wide = torch.promote_types(hidden.dtype, torch.float32).itemsize
    size = max(1, CHUNK_BYTES // (head.shape[0] * wide))
    return zip(hidden.split(size), targets.split(size))


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        head = head.detach().to(hidden.dtype)
        result = torch.empty(hidden.shape[0], dtype=_wide(hidden[:0]).dtype, device=hidden.device)
        need = ctx.needs_input_grad[0]
        slope = torch.empty(hidden.shape, dtype=result.dtype, device=hidden.device) if need else None
        done, buffer = 0, None
        for rows, ids in _chunks(hidden, head, targets):
            if (
                buffer is None
            ):  # one for all chunks: the first is the largest, and new pages cost a CPU a tenth of the product
                buffer = hidden.new_empty(rows.shape[0], head.shape[0])
            logits = _wide(torch.mm(rows, head.T, out=buffer[: rows.shape[0]]))
            here = slice(done, done + rows.shape[0])
            done = here.stop
            target = logits.gather(1, ids[:, None])[:, 0]
            top = logits.amax(-1, keepdim=True)
            weights = logits.sub_(top).exp_()  # the chunk's own buffer, nobody else's
            total = weights.sum(-1)
            result[here] = target - top[:, 0] - total.log()
            if slope is not None:
                expected = (weights.to(head.dtype) @ head).to(result.dtype) / total[:, None]
                torch.sub(head[ids].to(result.dtype), expected, out=slope[here])
        ctx.hidden_dtype = hidden.dtype
        ctx.save_for_backward(*([slope] if slope is not None else []))
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return (slope * grad[:, None]).to(ctx.hidden_dtype), None, None
