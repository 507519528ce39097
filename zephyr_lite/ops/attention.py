"""Attention over a segment table: every segment sees its own run causally, and the run before it that it names.

Keys and values of a shared prompt are gathered in front of the rejected response's own. On CUDA, in 16 bits and
from compute capability 8.0, this is PyTorch's variable-length FlashAttention in one call; elsewhere SDPA, a call a
segment. (Partial attentions are not merged by their log-sum-exp: the backward pass of the variable-length kernel
ignores its gradient, and the result would be silently wrong.)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class SegmentLike(Protocol):
    """What this file needs of a segment (``data.batch.Segment`` is one)."""

    @property
    def queries(self) -> int: ...

    @property
    def keys(self) -> int: ...

    def key_runs(self) -> list[tuple[int, int]]: ...


@dataclass(frozen=True)
class SegmentTable:
    """A segment table made ready for a device: built once a micro-batch, read by every layer.

    Attributes:
        query_lengths, key_lengths: a number a segment.
        runs: the runs of keys in the order in which they are gathered, or None where that is the identity.
        window: how many keys back a query sees, itself included; None: all.
        cu_queries, cu_keys: [S + 1] int32 cumulative lengths.
    """

    query_lengths: list[int]
    key_lengths: list[int]
    runs: list[tuple[int, int]] | None
    window: int | None
    cu_queries: Tensor
    cu_keys: Tensor

    @classmethod
    def build(cls, segments: Sequence[SegmentLike], window: int | None, device: torch.device) -> SegmentTable:
        queries, keys = [s.queries for s in segments], [s.keys for s in segments]
        runs = [run for s in segments for run in s.key_runs()]

        def cumulative(lengths: list[int]) -> Tensor:
            return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device)

        return cls(queries, keys, None if keys == queries else runs, window, cumulative(queries), cumulative(keys))


def attention(q: Tensor, k: Tensor, v: Tensor, table: SegmentTable, scale: float) -> Tensor:
    """Softmax attention of every segment's queries over the keys that it sees.

    Args:
        q: [T, H, d]; k, v: [T, H_kv, d] with H a multiple of H_kv.
        table: the segments.
        scale: what the products are multiplied with before the softmax.
    Returns:
        [T, H, d].
    """
    if table.runs is not None:
        k, v = _Gather.apply(k, table.runs), _Gather.apply(v, table.runs)
    if _has_flash(q):
        return _varlen(q, k, v, table, scale)
    return _by_segment(q, k, v, table, scale)


class _Gather(torch.autograd.Function):
    """Concatenate runs of rows. The backward pass adds run by run, in order: deterministic, unlike an index_add."""

    @staticmethod
    def forward(ctx, x: Tensor, runs: list[tuple[int, int]]) -> Tensor:  # type: ignore[override]
        ctx.shape, ctx.runs = x.shape, runs
        return torch.cat([x[start:end] for start, end in runs])

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        result = grad.new_zeros(ctx.shape)
        position = 0
        for start, end in ctx.runs:
            result[start:end] += grad[position : position + end - start]
            position += end - start
        return result, None


def _by_segment(q: Tensor, k: Tensor, v: Tensor, table: SegmentTable, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if q.is_cuda and groups > 1:
        # SDPA's memory-efficient kernel knows no grouped queries, and what it falls back to holds every score
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    parts = []
    pieces = zip(
        q.split(table.query_lengths), k.split(table.key_lengths), v.split(table.key_lengths), table.query_lengths
    )
    for q_part, k_part, v_part, queries in pieces:
        keys = k_part.shape[0]
        whole = queries == keys and (table.window is None or table.window >= keys)
        # SDPA's is_causal is aligned to the top left on a CPU: right for a square, wrong for anything else
        mask = None if whole else _mask(queries, keys, table.window, q.device)
        out = F.scaled_dot_product_attention(
            q_part.transpose(0, 1)[None],
            k_part.transpose(0, 1)[None],
            v_part.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=whole,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool, causal from the bottom right; a window of w sees the query's own key and w - 1 before it."""
    distance = (torch.arange(queries, device=device)[:, None] + (keys - queries)) - torch.arange(keys, device=device)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


@cache
def _varlen_parameters() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _has_flash(q: Tensor) -> bool:
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and bool(_varlen_parameters())
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, table: SegmentTable, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_parameters()
    options: dict[str, Any] = {}
    if "scale" in known:
        options["scale"] = scale
    elif abs(scale * q.shape[-1] ** 0.5 - 1) > 1e-6:
        q = q * (scale * q.shape[-1] ** 0.5)  # this version always divides by sqrt(d)
    if "window_size" in known:
        options["window_size"] = (-1 if table.window is None else table.window - 1, 0)
    elif table.window is None or table.window >= max(table.key_lengths):
        options["is_causal"] = True
    else:
        return _by_segment(q, k, v, table, scale)  # torch 2.10 and older know no window
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return varlen_attn(
        q, k, v, table.cu_queries, table.cu_keys, max(table.query_lengths), max(table.key_lengths), **options
    )
