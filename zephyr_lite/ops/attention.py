"""Attention over a segment table: every segment sees its own run causally, and the run before it that it names.

Keys and values of a shared prompt are gathered in front of the rejected response's own; their gradients are added run
by run, in order. (Partial attentions are not merged by their log-sum-exp: the backward pass of the variable-length
kernel ignores its gradient, and the result would be silently wrong.)

Forward and backward are functions of their own, because the decoder layer decides what is kept between them. What
computes is one of PyTorch's kernels (``backend``):

    flash       CUDA from compute capability 8.0, 16 bits: FlashAttention-2 over cumulative lengths (Dao 2023, arXiv 2307.08691)
    efficient   other CUDA cards and float32: the memory-efficient kernel over cumulative lengths, causal from the bottom right;
                segments that it computes wrong gradients for (``SegmentTable.misaligned``) are computed as ``plain``
    cpu         the CPU's flash kernel, a call a segment
    plain       softmax spelled out, a segment at a time: what the others cannot (float64 on CUDA, odd head sizes)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .segments import SegmentTable, gathered, scattered

Backend = Literal["flash", "efficient", "cpu", "plain"]
_AT_ONCE = 2**24  # scores of a head that are masked at once
_CAUSAL_FROM_BOTTOM_RIGHT = 2  # what the memory-efficient kernel calls it


def backend(q: Tensor) -> Backend:
    """Which kernel computes for queries of [T, H, d]."""
    if not q.is_cuda:
        return "cpu"
    size, half = q.shape[-1], q.dtype in (torch.bfloat16, torch.float16)
    if half and size % 8 == 0 and size <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0):
        return "flash"
    if q.dtype != torch.float64 and size % (8 if half else 4) == 0:
        return "efficient"
    return "plain"


def attention_forward(q: Tensor, k: Tensor, v: Tensor, table: SegmentTable, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of every segment's queries over the keys that it sees.

    Args:
        q: [T, H, d]; k, v: [T, H_kv, d] with H a multiple of H_kv; dense in their last dimension.
        table: the segments.
        scale: what the products are multiplied with before the softmax.
    Returns:
        out [T, H, d] contiguous, and the log-sum-exp of every query's scores in max(float32, dtype): T H numbers, in a
        layout of their own; hand it to ``attention_backward`` as it is.
    """
    kind = backend(q)
    k, v = gathered(k, v, table)
    if kind == "flash":
        left, right = _window(table)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            table.cu_queries,
            table.cu_keys,
            max(table.query_lengths),
            max(table.key_lengths),
            0.0,
            left < 0,
            False,
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        return out, lse
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if kind == "efficient":
        wide_k, wide_v = _repeated(k, q), _repeated(v, q)
        for run in _like_lengths(table):
            rows, keys = run.rows
            found, padded, *_ = torch.ops.aten._efficient_attention_forward(
                q[None, rows],
                wide_k[None, keys],
                wide_v[None, keys],
                None,
                run.cu_queries,
                run.cu_keys,
                max(run.query_lengths),
                max(run.key_lengths),
                0.0,
                _CAUSAL_FROM_BOTTOM_RIGHT,
                True,
                scale=scale,
                window_size=run.effective_window,
            )
            out[rows] = found[0]
            lse[rows] = _by_token(padded, run.query_lengths)
    forward = _cpu_forward if kind == "cpu" else _plain_forward
    for rows, keys, window in _pieces(table, kind, q.shape[1]):
        here = forward(_grouped(q, k, rows), _heads(k, keys), _heads(v, keys), window, scale)
        _grouped(out, k, rows).copy_(here[0])
        _grouped(lse[..., None], k, rows)[..., 0].copy_(here[1])
    return out, lse


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: SegmentTable,
    scale: float,
    into: Tensor,
) -> None:
    """Write the gradients of q, k and v.

    Args:
        grad: [T, H, d], of out.
        q, k, v, table, scale: as for the forward pass.
        out, lse: what it returned.
        into: [T, H + 2 H_kv, d], dq, dk and dv beside each other; overwritten.
    """
    kind = backend(q)
    d_q, d_k, d_v = into.split([q.shape[1], k.shape[1], k.shape[1]], dim=1)
    k, v = gathered(k, v, table)
    if kind == "flash":
        left, right = _window(table)
        none = torch.empty(0, device=q.device)
        state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not: never read
        d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            table.cu_queries,
            table.cu_keys,
            max(table.query_lengths),
            max(table.key_lengths),
            0.0,
            left < 0,
            state,
            none,
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
    else:
        direct = kind != "efficient" and table.runs is None
        b, c = (d_k.zero_(), d_v.zero_()) if direct else (k.new_zeros(k.shape), v.new_zeros(v.shape))
        if kind == "efficient":
            seed = torch.zeros((), dtype=torch.int64, device=q.device)
            wide_k, wide_v = _repeated(k, q), _repeated(v, q)
            for run in _like_lengths(table):
                rows, keys = run.rows
                gq, gk, gv, _ = torch.ops.aten._efficient_attention_backward(
                    grad[None, rows],
                    q[None, rows],
                    wide_k[None, keys],
                    wide_v[None, keys],
                    None,
                    out[None, rows],
                    run.cu_queries,
                    run.cu_keys,
                    max(run.query_lengths),
                    max(run.key_lengths),
                    _padded(lse[rows], run.query_lengths),
                    0.0,
                    seed,
                    seed,
                    _CAUSAL_FROM_BOTTOM_RIGHT,
                    False,
                    scale=scale,
                    window_size=run.effective_window,
                )
                d_q[rows] = gq[0]
                b[keys], c[keys] = _summed(gk[0], k), _summed(gv[0], k)
        backward = _cpu_backward if kind == "cpu" else _plain_backward
        for rows, keys, window in _pieces(table, kind, q.shape[1]):
            gq, gk, gv = backward(
                _grouped(grad, k, rows),
                _grouped(q, k, rows),
                _heads(k, keys),
                _heads(v, keys),
                _grouped(out, k, rows),
                _grouped(lse[..., None], k, rows)[..., 0],
                window,
                scale,
            )
            _grouped(d_q, k, rows).copy_(gq)
            b[keys] += gk.sum(1).transpose(0, 1)
            c[keys] += gv.sum(1).transpose(0, 1)
        if direct:
            return
        d_k, d_v, into = b, c, into[:, q.shape[1] :]
    d_k, d_v = scattered(d_k, d_v, table)
    torch.cat([d_q, d_k, d_v] if kind == "flash" else [d_k, d_v], dim=1, out=into)


def _pieces(table: SegmentTable, kind: Backend, heads: int) -> Iterator[tuple[slice, slice, int | None]]:
    """The segments that no call over cumulative lengths computes: their place among the queries and among the gathered keys,
    and the window. One whose mask (or scores) would be large goes in blocks of
    queries, each with the keys that it sees: 32 k tokens squared are 4 GB, a block of them under a window is a few MB."""
    at_once = _AT_ONCE if kind == "cpu" else _AT_ONCE // heads  # the CPU's kernel has one mask for all heads
    for i, ((first, last), (start, end)) in enumerate(zip(pairwise(table.query_starts), pairwise(table.key_starts))):
        if kind == "efficient" and i not in table.misaligned:
            continue
        queries, keys, window = last - first, end - start, table.window
        windowed = window is not None and window < keys
        if (kind == "cpu" and queries == keys and not windowed) or queries * keys <= at_once:
            yield slice(first, last), slice(start, end), window
            continue
        size = at_once // keys
        if window is not None:
            # a block of n queries sees n + window - 1 keys, of which it needs fewer the larger it is
            size = min(int(((window**2 + 4 * at_once) ** 0.5 - window) / 2), max(window, 256))
        size = max(1, size)
        for here in range(first, last, size):
            there = min(last, here + size)
            stop = end - (last - there)  # causal from the bottom right
            begin = start if window is None else max(start, stop - (there - here) - window + 1)
            yield slice(here, there), slice(begin, stop), window


def _like_lengths(table: SegmentTable) -> list[SegmentTable]:
    """The segments but the misaligned ones, in runs of like length: the memory-efficient kernel takes room for every segment
    as if it were the longest of its call, and one long conversation among many short ones would take ten times what it needs.
    """
    borders = [0]
    for end in range(1, len(table.query_lengths)):
        lengths = table.query_lengths[borders[-1] : end + 1]
        apart = not table.misaligned.isdisjoint((borders[-1], end))
        if apart or len(lengths) * max(lengths) > 2 * sum(lengths):
            borders.append(end)
    borders.append(len(table.query_lengths))
    return [table.part(first, end) for first, end in pairwise(borders) if first not in table.misaligned]


def _by_token(padded: Tensor, lengths: list[int]) -> Tensor:
    """[S, H, at least the longest] → [Σ lengths, H]"""
    return torch.cat([padded[i, :, :n].T for i, n in enumerate(lengths)])


def _padded(lse: Tensor, lengths: list[int]) -> Tensor:
    """[Σ lengths, H] → [S, H, the longest rounded up to 32], infinite beyond, as the kernel's forward pass leaves it."""
    longest = -(-max(lengths) // 32) * 32
    result = lse.new_full((len(lengths), lse.shape[1], longest), torch.inf)
    for row, part in zip(result, lse.split(lengths)):
        row[:, : part.shape[0]] = part.T
    return result


def _window(table: SegmentTable) -> tuple[int, int]:
    """FlashAttention counts the keys to the left of a query's own; -1: all."""
    window = table.effective_window
    return (-1 if window is None else window - 1), 0


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """[T, H_kv, d] → [T, H, d], for a kernel that knows no grouped queries."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _summed(grad: Tensor, k: Tensor) -> Tensor:
    """The gradient of ``_repeated``."""
    return grad if grad.shape[1] == k.shape[1] else grad.unflatten(1, (k.shape[1], -1)).sum(2)


def _grouped(x: Tensor, k: Tensor, rows: slice) -> Tensor:
    """Rows of a [T, H, d] tensor as [H_kv, H / H_kv, rows, d]: heads that share a key beside each other, no copy."""
    return x[rows].unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)


def _heads(x: Tensor, rows: slice) -> Tensor:
    """Rows of keys or values as [H_kv, 1, rows, d]."""
    return x[rows].transpose(0, 1)[:, None]


def _mask(q: Tensor, k: Tensor, window: int | None) -> Tensor | None:
    """What is added to the scores: 0 or -inf, causal from the bottom right; a window of w is the query's own key and
    w - 1 before it. None where the kernel's own causal mask, which is aligned to the top left, is the same."""
    queries, keys = q.shape[-2], k.shape[-2]
    if queries == keys and (window is None or window >= keys):
        return None
    hidden = _hidden(queries, keys, window, q.device)
    return torch.zeros(queries, keys, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)


def _hidden(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool: which keys a query does not see."""
    distance = (torch.arange(queries, device=device)[:, None] + (keys - queries)) - torch.arange(keys, device=device)
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
    mask = _mask(q, k, window)
    k, v = k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale
    )


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _mask(q, k, window)
    k, v = k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, mask is None, attn_mask=mask, scale=scale
    )


def _scores(q: Tensor, k: Tensor, window: int | None, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    return scores.masked_fill_(_hidden(q.shape[-2], k.shape[-2], window, q.device), -torch.inf)


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, window, scale)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.to(scores.dtype)).to(q.dtype), lse


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    p = (_scores(q, k, window, scale) - lse[..., None]).exp()
    wide = grad.to(p.dtype)
    inner = (wide * out.to(p.dtype)).sum(-1, keepdim=True)
    ds = p * (wide @ v.to(p.dtype).transpose(-1, -2) - inner) * scale
    d_q, d_k = ds @ k.to(p.dtype), ds.transpose(-1, -2) @ q.to(p.dtype)
    return d_q.to(q.dtype), d_k.to(q.dtype), (p.transpose(-1, -2) @ wide).to(q.dtype)
