"""Segment tables: which queries of a flat row see which keys, and the keys and values of shared prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SegmentTable:
    """A segment table made ready for a device: built once a micro-batch, read by every layer.

    Attributes:
        query_lengths, key_lengths: a number a segment.
        query_starts, key_starts: [S + 1] where each segment's queries, and its gathered keys, begin.
        runs: the runs of keys in the order in which they are gathered, or None where that is the identity.
        window: how many keys back a query sees, itself included; None: all.
        cu_queries, cu_keys: [S + 1] int32, the starts on the device (``segment_starts``).
    """

    query_lengths: list[int]
    key_lengths: list[int]
    query_starts: list[int]
    key_starts: list[int]
    runs: list[tuple[int, int]] | None
    window: int | None
    cu_queries: Tensor
    cu_keys: Tensor

    @property
    def rows(self) -> tuple[slice, slice]:
        """The places of all queries, and of all gathered keys."""
        return slice(self.query_starts[0], self.query_starts[-1]), slice(self.key_starts[0], self.key_starts[-1])

    @property
    def effective_window(self) -> int | None:
        """The window, or None where all keys of every segment are within it."""
        return self.window if self.window is not None and self.window < max(self.key_lengths) else None

    def part(self, first: int, end: int) -> SegmentTable:
        """Consecutive segments alone; they stay where they are among queries and gathered keys."""
        return replace(
            self,
            query_lengths=self.query_lengths[first:end],
            key_lengths=self.key_lengths[first:end],
            query_starts=self.query_starts[first : end + 1],
            key_starts=self.key_starts[first : end + 1],
            cu_queries=self.cu_queries[first : end + 1] - self.query_starts[first],
            cu_keys=self.cu_keys[first : end + 1] - self.key_starts[first],
        )

    @cached_property
    def misaligned(self) -> frozenset[int]:
        """The segments that the window cuts and that have more keys than queries.

        PyTorch's memory-efficient kernel (2.11 to 2.14) applies the window from the bottom right in its forward pass, but
        from the top left in its backward pass (kernel_backward.h, "Apply mask"), so that their gradients are wrong.
        """
        lengths = enumerate(zip(self.query_lengths, self.key_lengths))
        return frozenset(i for i, (q, k) in lengths if self.window is not None and q < k and self.window < k)

    @classmethod
    def build(cls, segments: Sequence[Any], window: int | None, starts: Tensor) -> SegmentTable:
        """The table of a batch's segments (``data.batch.Segment``), no two of which see the same prefix.

        Args:
            starts: ``segment_starts`` of them, on the device.
        """
        queries = [segment.queries for segment in segments]
        keys = [segment.keys for segment in segments]
        begin = list(accumulate(queries, initial=0)), list(accumulate(keys, initial=0))
        runs = None if keys == queries else [run for segment in segments for run in segment.key_runs()]
        return cls(queries, keys, *begin, runs, window, *starts)


def segment_starts(segments: Sequence[Any]) -> Tensor:
    """Where each segment's queries, and its gathered keys, begin: [2, S + 1] int32 on the host."""
    lengths = ([segment.queries for segment in segments], [segment.keys for segment in segments])
    return torch.tensor([list(accumulate(n, initial=0)) for n in lengths], dtype=torch.int32)


def gathered(k: Tensor, v: Tensor, table: SegmentTable) -> tuple[Tensor, Tensor]:
    """The keys and values of every run, in one launch."""
    if table.runs is None:
        return k, v
    both = torch.cat([x[start:end] for x in (k, v) for start, end in table.runs])
    return both[: len(both) // 2], both[len(both) // 2 :]


def scattered(d_k: Tensor, d_v: Tensor, table: SegmentTable) -> tuple[Tensor, Tensor]:
    """The gradients of ``gathered``, in two launches: the segments' own runs, to which the prefixes' are added. A token is in
    one prefix at most, so that the sum has an order, unlike an index_add's."""
    if table.runs is None:
        return d_k, d_v
    own, prefixes, done = [], [], 0
    for (start, end), place in zip(table.runs, accumulate((b - a for a, b in table.runs), initial=0)):
        if start == done:
            own.append(slice(place, place + end - start))
            done = end
        else:
            prefixes.append((slice(start, end), slice(place, place + end - start)))
    result = torch.cat([x[run] for x in (d_k, d_v) for run in own]).unflatten(0, (2, done))
    torch._foreach_add_(
        [part[rows] for part in result for rows, _ in prefixes],
        [x[run] for x in (d_k, d_v) for _, run in prefixes],
    )
    return result[0], result[1]
