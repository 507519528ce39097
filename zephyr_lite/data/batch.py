"""One flat row of tokens: what the model runs, for SFT, DPO, the reference and evaluation alike. Padding does not exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ..ops.segments import segment_starts
from .chat_template import Example, PairExample


@dataclass(frozen=True)
class Segment:
    """A run of queries and the runs of keys that it sees.

    Attributes:
        start, end: the queries are tokens ``start:end`` of the row.
        prefix: an earlier run of tokens whose keys come before the segment's own, or None. The queries see all of
            it and their own run causally, aligned at the bottom right.
    """

    start: int
    end: int
    prefix: tuple[int, int] | None = None

    @property
    def queries(self) -> int:
        return self.end - self.start

    @property
    def keys(self) -> int:
        return self.queries + (self.prefix[1] - self.prefix[0] if self.prefix else 0)

    def key_runs(self) -> list[tuple[int, int]]:
        return [*([self.prefix] if self.prefix else []), (self.start, self.end)]


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        tokens: [T] int64.
        positions: [T] int64, the position that rotary embeddings see; a rejected response continues its prompt's.
        streams: [T] int64, whose token this is (twice the example's index; one more in a rejected response). With
            ``positions`` it names a token independently of how rows are packed, which dropout relies on.
        segments: cover 0:T in order without gaps.
        segment_starts: [2, S + 1] int32, where the queries and the keys of each begin (``ops.attention.segment_starts``).
        target_rows: [N] int64, the hidden state that predicts each target; ordered by group.
        target_ids: [N] int64, the token that it should predict.
        group_sizes: [G] int64, how many targets each response has, in order: one group an example (SFT), chosen and
            rejected in turn (DPO).
        indices: the examples' indices in the data set, in order.
        host_tokens: the tokens on the host, for an embedding there; None while ``tokens`` are on the host.
    """

    tokens: Tensor
    positions: Tensor
    streams: Tensor
    segments: tuple[Segment, ...]
    segment_starts: Tensor
    target_rows: Tensor
    target_ids: Tensor
    group_sizes: Tensor
    indices: tuple[int, ...]
    host_tokens: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.numel()

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device, in one copy: from page-locked memory, because the CPU would wait for another one."""
        device = torch.device(device)
        tables = {
            name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name != "host_tokens"
        }
        # each begins at a multiple of 16 bytes, for which kernels are compiled
        starts = list(accumulate((-(-table.nbytes // 16) * 16 for table in tables.values()), initial=0))
        host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")

        def views(memory: Tensor) -> dict[str, Tensor]:
            parts = zip(tables.items(), starts)
            return {name: memory[s : s + t.nbytes].view(t.dtype).view(t.shape) for (name, t), s in parts}

        for name, view in views(host).items():
            view.copy_(tables[name])
        moved = views(host.to(device, non_blocking=True))
        return replace(self, host_tokens=self.tokens if self.host_tokens is None else self.host_tokens, **moved)

    def sum_by_group(self, values: Tensor) -> Tensor:
        """[N] values per target → [G] sums per response, in a fixed order (no atomics), differentiable."""
        # unsafe: the lengths are ours, and checking them would wait for the device
        return torch.segment_reduce(values, "sum", lengths=self.group_sizes, initial=0.0, unsafe=True)


def collate_conversations(examples: Sequence[Example]) -> Batch:
    """Conversations side by side, each a segment that sees only itself.

    A token with its mask set is a target, except the first.
    """
    tokens, positions, streams, segments, rows, ids, sizes, indices = [], [], [], [], [], [], [], []
    offset = 0
    for example in examples:
        length = len(example.ids)
        tokens.append(example.ids)
        positions.append(np.arange(length))
        streams.append(np.full(length, 2 * example.index))
        segments.append(Segment(offset, offset + length))
        targets = np.flatnonzero(example.mask[1:]) + 1
        rows.append(offset + targets - 1)
        ids.append(example.ids[targets])
        sizes.append(len(targets))
        indices.append(example.index)
        offset += length
    return _batch(tokens, positions, streams, segments, rows, ids, sizes, indices)


def collate_pairs(pairs: Sequence[PairExample]) -> Batch:
    """Preference pairs side by side: [prompt, chosen] is one segment, [rejected] another that sees the prompt's keys. An answer
    with a label, where one side has no tokens, is one segment with its prompt.

    The first token of both responses is predicted by the same hidden state, the prompt's last.
    """
    tokens, positions, streams, segments, rows, ids, sizes, indices = [], [], [], [], [], [], [], []
    offset = 0
    for pair in pairs:
        prompt, chosen, rejected = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
        first, second = offset, offset + prompt + chosen
        tokens += [pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]
        positions += [np.arange(prompt + chosen), np.arange(prompt, prompt + rejected)]
        streams += [np.full(prompt + chosen, 2 * pair.index), np.full(rejected, 2 * pair.index + 1)]
        if chosen and rejected:
            segments.append(Segment(first, second))
            segments.append(Segment(second, second + rejected, prefix=(first, first + prompt)))
        else:
            segments.append(Segment(first, second + rejected))
        last = first + prompt - 1
        for start, response, mask in (
            (first + prompt, pair.chosen_ids, pair.chosen_mask),
            (second, pair.rejected_ids, pair.rejected_mask),
        ):
            targets = np.flatnonzero(mask)
            rows.append(np.where(targets == 0, last, start + targets - 1))
            ids.append(response[targets])
            sizes.append(len(targets))
        indices.append(pair.index)
        offset = second + rejected
    return _batch(tokens, positions, streams, segments, rows, ids, sizes, indices)


def _batch(
    tokens: list[np.ndarray],
    positions: list[np.ndarray],
    streams: list[np.ndarray],
    segments: list[Segment],
    target_rows: list[np.ndarray],
    target_ids: list[np.ndarray],
    sizes: list[int],
    indices: list[int],
) -> Batch:
    def flat(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    return Batch(
        tokens=flat(tokens),
        positions=flat(positions),
        streams=flat(streams),
        segments=tuple(segments),
        segment_starts=segment_starts(segments),
        target_rows=flat(target_rows),
        target_ids=flat(target_ids),
        group_sizes=torch.tensor(sizes, dtype=torch.int64),
        indices=tuple(indices),
    )
