"""``zephyr-lite data stats``: how long rows are, what is cut and left out, how full rows are packed, tokens and steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc

from ..config.load import RunConfig
from ..data.dataset import DataReport, TokenizedDataset, prepare
from ..data.packing import best_fit
from ..train.steps import step_schedule
from .trained_rows import TrainedRows, example_column, example_places

# no example is as long
_UNCUT = 2**30


@dataclass(frozen=True)
class Lengths:
    """Tokens of one part of the examples.

    Attributes:
        name: of the part.
        values: [n] int64, one for each example.
    """

    name: str
    values: np.ndarray

    def summary(self) -> tuple[float, int, int, int, int]:
        """Mean, median, 90th and 99th percentile, and the longest."""
        quantiles = np.quantile(self.values, [0.5, 0.9, 0.99], method="inverted_cdf")
        return (float(self.values.mean()), *(int(q) for q in quantiles), int(self.values.max()))  # type: ignore[return-value]


@dataclass(frozen=True)
class Budget:
    """What another ``max_length`` would do to conversations.

    Attributes:
        max_length: of a packed row.
        left_out: conversations whose first supervised token lies beyond it.
        cut: others that are longer than it.
        lost: their supervised tokens beyond it.
        rows: packed rows; fill: how full they are; steps: in all, at the configuration's batch size.
    """

    max_length: int
    left_out: int
    cut: int
    lost: int
    rows: int
    fill: float
    steps: int


@dataclass
class SourceStats:
    """One source of a mixture: examples kept, rows left out, and tokens (cut to the budget) in an epoch."""

    kept: int = 0
    left_out: int = 0
    cut: int = 0
    tokens: int = 0
    supervised: int = 0


@dataclass
class RowStats:
    """What ``data stats`` says.

    Attributes:
        method, config: of the run.
        report: of the rows as training gets them.
        whole: lengths before anything is cut. The first is what ``max_length`` bounds: conversations, or a pair's prompt
            with its longer response.
        parts: of pairs: prompts, chosen and rejected responses, before cutting.
        budgets: half, double … of ``max_length`` (of an sft stage's training rows).
        cut_places: places of examples that were cut, in order, and how many supervised tokens each lost.
        sources: by name.
        rows: packed rows, or pairs; per_epoch, steps: of ``step_schedule``.
        chosen_longer: of pairs, the share whose chosen response has more tokens.
    """

    method: str
    config: RunConfig
    report: DataReport
    whole: Lengths
    parts: list[Lengths] = field(default_factory=list)
    budgets: list[Budget] = field(default_factory=list)
    cut_places: list[tuple[str, int]] = field(default_factory=list)
    sources: dict[str, SourceStats] = field(default_factory=dict)
    rows: int = 0
    per_epoch: int = 0
    steps: int = 0
    chosen_longer: float = 0.0


def measure(opened: TrainedRows) -> RowStats:
    """Count. Where something was cut, the rows are tokenized once more without a budget, to know how long they are."""
    data, config = opened.data, opened.config
    uncut = data
    if data.report.cut or any("max_length" in reason for reason in data.report.dropped):
        free = config.model_copy(update={"max_length": _UNCUT, "max_prompt_length": _UNCUT})
        uncut = prepare(opened.specs, opened.method, free, opened.template, what=data.report.what)
    per_epoch, steps = step_schedule(config, len(data.rows))
    stats = RowStats(
        opened.method,
        config,
        data.report,
        Lengths("conversation", uncut.lengths),
        rows=len(data.rows),
        per_epoch=per_epoch,
        steps=steps,
        sources=_sources(data),
        cut_places=_cut_places(data),
    )
    if opened.method == "sft":
        stats.budgets = _budgets(uncut, config) if data.report.what == "training" else []
        return stats
    prompt, chosen, rejected = (_list_lengths(uncut, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    stats.whole = Lengths("prompt + longer response", prompt + np.maximum(chosen, rejected))
    stats.parts = [Lengths("prompt", prompt), Lengths("chosen", chosen), Lengths("rejected", rejected)]
    stats.chosen_longer = float((chosen > rejected).mean())
    return stats


def _list_lengths(data: TokenizedDataset, name: str) -> np.ndarray:
    return pc.list_value_length(example_column(data, name)).to_numpy().astype(np.int64)


def _cut_places(data: TokenizedDataset) -> list[tuple[str, int]]:
    if not data.report.cut:
        return []
    cut = example_column(data, "cut").to_numpy() > 0
    lost, places = example_column(data, "lost").to_numpy(), example_places(data)
    return [(places[index], int(lost[index])) for index in np.flatnonzero(cut)]


def _sources(data: TokenizedDataset) -> dict[str, SourceStats]:
    """By what stands before "row N" in each place, in the order of appearance."""
    result: dict[str, SourceStats] = {}
    columns = [example_column(data, name).to_numpy() for name in ("length", "supervised", "cut")]
    for place, length, supervised, cut in zip(example_places(data), *columns):
        source = result.setdefault(_source(place), SourceStats())
        source.kept += 1
        source.cut += int(cut > 0)
        source.tokens += int(length)
        source.supervised += int(supervised)
    for name, count in Counter(_source(p) for where in data.report.dropped.values() for p in where).items():
        result.setdefault(name, SourceStats()).left_out = count
    return result


def _source(place: str) -> str:
    return place.rpartition(" row ")[0]


def _budgets(uncut: TokenizedDataset, config: RunConfig) -> list[Budget]:
    """A quarter to four times ``max_length``, up to the first that cuts nothing."""
    own, lengths = config.max_length, uncut.lengths
    sizes = [size for size in (own // 4, own // 2, own, own * 2, own * 4) if size >= 2]
    within, first = _supervised_within(uncut, sizes)
    found = []
    for max_length, inside in zip(sizes, within):
        kept = first < max_length
        if not kept.any():
            continue
        short = np.minimum(lengths[kept], max_length)
        rows = len(best_fit(short, max_length))
        cut = kept & (lengths > max_length)
        found.append(
            Budget(
                max_length,
                int((~kept).sum()),
                int(cut.sum()),
                int((within[-1] - inside)[cut].sum()),
                rows,
                float(short.sum() / (rows * max_length)),
                step_schedule(config, rows)[1],
            )
        )
        if not cut.any() and kept.all() and max_length >= own:
            break
    return found


def _supervised_within(data: TokenizedDataset, sizes: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """[n] int64 for each size and, last, for the whole: supervised tokens among an example's first ones. And [n] int64:
    the place of its first supervised token."""
    masks = data.examples.columns("mask")
    counts: list[list[np.ndarray]] = [[] for _ in [*sizes, None]]
    firsts = []
    for start in range(0, len(masks), 1000):
        column = masks[start : start + 1000].column("mask").combine_chunks()
        lengths = column.value_lengths().to_numpy().astype(np.int64)
        ends = np.cumsum(lengths)
        total = np.concatenate([[0], np.cumsum(column.flatten().to_numpy(zero_copy_only=False))])
        begun = total[ends - lengths]
        for size, into in zip([*sizes, _UNCUT], counts):
            into.append(total[ends - lengths + np.minimum(lengths, size)] - begun)
        # the running total is one more right after the first supervised token
        firsts.append(np.searchsorted(total, begun + 1) - 1 - (ends - lengths))
    return [np.concatenate(each) for each in counts], np.concatenate(firsts)


# -- histogram -----------------------------------------------------------------------------------------------------------

_BINS = 16


def histogram(values: np.ndarray, mark: int) -> list[tuple[int, int | None, int]]:
    """(from, to, how many) of bins whose width is a power of two, so that ``mark`` falls between two of them where it is
    one too; the last, open one (to None) takes what is rare and long.

    Args:
        values: [n] int64, each at least 1.
        mark: a bin begins right after it, where there are values beyond.
    """
    longest = int(values.max())
    rare = max(int(np.quantile(values, 0.99, method="inverted_cdf")), min(mark, longest))
    width = 1
    while width * _BINS < rare:
        width *= 2
    edges = list(range(0, rare + width, width))  # bins (edge, next edge]
    if edges[-1] > mark and mark not in edges and longest > mark:
        edges = sorted([*edges, mark])
    counts = np.histogram(values, bins=[edge + 0.5 for edge in edges])[0]
    bins: list[tuple[int, int | None, int]] = [
        (low + 1, high, int(n)) for low, high, n in zip(edges, edges[1:], counts)
    ]
    if longest > edges[-1]:
        bins.append((edges[-1] + 1, None, int((values > edges[-1]).sum())))
    first = next(place for place, each in enumerate(bins) if each[2])
    return bins[first:]
