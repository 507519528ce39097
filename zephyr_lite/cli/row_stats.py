"""``zephyr-lite data stats``: lengths of rows, cut and dropped rows, packing, tokens and steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from rich.text import Text

from ..config.load import RunConfig
from ..data.dataset import DataReport, prepare
from ..data.packing import best_fit
from ..train.steps import step_schedule
from .rows import TrainedRows

_UNCUT = 2**30  # longer than any example
_BAR, _BINS = 40, 16


class Budget(NamedTuple):
    """Another ``max_length``: dropped and cut conversations, supervised tokens lost, packed rows, their fill, steps."""

    max_length: int
    left_out: int
    cut: int
    lost: int
    rows: int
    fill: float
    steps: int


@dataclass
class SourceStats:
    """Counts of one source of a mixture: examples, dropped rows, and tokens of an epoch after cutting."""

    kept: int = 0
    left_out: int = 0
    cut: int = 0
    tokens: int = 0
    supervised: int = 0


@dataclass
class RowStats:
    """Statistics of a stage's rows.

    Attributes:
        report: of the preparation for training.
        whole: [n] tokens that ``max_length`` bounds, before cutting: of conversations, or of prompts with the longer
            response.
        per_epoch, steps: of ``step_schedule``.
        parts: for pairs, [n] tokens of prompts, chosen and rejected responses, before cutting.
        budgets: a quarter to four times ``max_length`` (sft, training rows).
        cut_places: places of cut examples, in order, and the supervised tokens that each lost.
        sources: by name, in the order of their first rows.
    """

    method: str
    config: RunConfig
    report: DataReport
    whole: np.ndarray
    per_epoch: int
    steps: int
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    budgets: list[Budget] = field(default_factory=list)
    cut_places: list[tuple[str, int]] = field(default_factory=list)
    sources: dict[str, SourceStats] = field(default_factory=dict)

    @property
    def chosen_longer(self) -> float:
        """The share of pairs whose chosen response has more tokens."""
        return float((self.parts["chosen"] > self.parts["rejected"]).mean())


def measure(opened: TrainedRows) -> RowStats:
    """Count. If anything was cut, the rows are tokenized again without a limit, for their lengths."""
    data, config = opened.data, opened.config
    uncut = opened
    if data.report.cut or any("max_length" in reason for reason in data.report.dropped):
        free = config.model_copy(update={"max_length": _UNCUT, "max_prompt_length": _UNCUT})
        whole = prepare(opened.specs, opened.method, free, opened.template, what=data.report.what)
        uncut = TrainedRows(opened.method, free, opened.template, opened.specs, whole)
    stats = RowStats(opened.method, config, data.report, uncut.data.lengths, *step_schedule(config, len(data.rows)))
    columns = [opened.column(name).to_pylist() for name in ("where", "length", "supervised", "cut", "lost")]
    for place, length, supervised, cut, lost in zip(*columns):
        source = stats.sources.setdefault(place.rpartition(" row ")[0], SourceStats())
        source.kept += 1
        source.tokens += length
        source.supervised += supervised
        if cut:
            source.cut += 1
            stats.cut_places.append((place, lost))
    for place in (place for where in data.report.dropped.values() for place in where):
        stats.sources.setdefault(place.rpartition(" row ")[0], SourceStats()).left_out += 1
    if opened.method == "sft":
        stats.budgets = _budgets(uncut, config) if data.report.what == "training" else []
        return stats
    for name in ("prompt", "chosen", "rejected"):
        stats.parts[name] = pc.list_value_length(uncut.column(f"{name}_ids")).to_numpy().astype(np.int64)
    stats.whole = stats.parts["prompt"] + np.maximum(stats.parts["chosen"], stats.parts["rejected"])
    return stats


def _budgets(uncut: TrainedRows, config: RunConfig) -> list[Budget]:
    """A quarter to four times ``max_length``, up to the first that cuts nothing."""
    own, lengths = config.max_length, uncut.data.lengths
    sizes = [size for size in (own // 4, own // 2, own, own * 2, own * 4) if size >= 2]
    # [n, sizes + 1] supervised tokens among the first ones of each example; in the last column all of them
    places = (np.flatnonzero(mask.values) for mask in uncut.column("mask"))
    within = np.array([np.searchsorted(supervised, [*sizes, _UNCUT]) for supervised in places])
    budgets = []
    for max_length, inside in zip(sizes, within.T):
        kept = inside > 0
        if not kept.any():
            continue
        short = np.minimum(lengths[kept], max_length)
        rows = len(best_fit(short, max_length))
        cut = kept & (lengths > max_length)
        lost = int((within[:, -1] - inside)[cut].sum())
        fill, steps = float(short.sum() / (rows * max_length)), step_schedule(config, rows)[1]
        budgets.append(Budget(max_length, int((~kept).sum()), int(cut.sum()), lost, rows, fill, steps))
        if not cut.any() and kept.all() and max_length >= own:
            break
    return budgets


def histogram(values: np.ndarray, mark: int) -> list[tuple[int, int | None, int]]:
    """(from, to, count) of bins with a width of a power of two; rare long values share the last bin, which has no end.

    Args:
        values: [n] int64, each at least 1.
        mark: a bin begins right after it, if there are larger values.
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


# -- lines ---------------------------------------------------------------------------------------------------------------


def stats_lines(stats: RowStats, *, width: int, colour: bool, places: int = 5) -> Iterator[Text]:
    """The statistics as lines.

    Args:
        width: in cells.
        colour: bars of blocks in colour, for a terminal; else of ``#``.
        places: the number of places to name for each reason; 0: all.
    """
    yield Text(f"{stats.report.what} data, {stats.method}", style="bold")
    for note in stats.report.notes:
        yield Text(f"  {note}")
    yield from _left_out_lines(stats, places)
    yield Text()
    yield from _length_lines(stats, width, colour)
    if stats.budgets:
        yield Text()
        yield from _budget_lines(stats)
    if len(stats.sources) > 1:
        total = max(1, sum(source.tokens for source in stats.sources.values()))
        yield Text()
        rows = [
            [name, *_numbers(s.kept, s.left_out, s.cut, s.tokens), f"{s.tokens / total:.1%}", f"{s.supervised:,}"]
            for name, s in stats.sources.items()
        ]
        yield from _table(["source", "kept", "left out", "cut", "tokens", "share", "supervised"], rows)
    yield Text()
    yield from _training_lines(stats)


def _left_out_lines(stats: RowStats, places: int) -> Iterator[Text]:
    report = stats.report
    for reasons, style, before in ((report.dropped, "red", "left out, "), (report.changed, "yellow", "changed, ")):
        for reason, where in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
            yield Text.assemble(("  " + before, style), f"{reason}: {len(where):,} ({_named(where, places)})")
    if stats.cut_places:
        unit = "conversations" if stats.method == "sft" else "pairs"
        prompts = f" ({report.prompts_cut:,} of them on the prompt's left)" if report.prompts_cut else ""
        lost = [f"{place} −{count:,}" if count else place for place, count in stats.cut_places]
        yield Text.assemble(
            (f"  cut to max_length {stats.config.max_length:,}", "yellow"),
            f": {len(stats.cut_places):,} {unit}{prompts}, −{report.supervised_lost:,} supervised tokens "
            f"({_named(lost, places)})",
        )
    if not (report.dropped or report.changed or stats.cut_places):
        yield Text("  nothing is left out, changed or cut")


def _named(where: Sequence[str], places: int) -> str:
    """The first places, each source named once: ``train.jsonl row 3, 7, 12, …``."""
    words: list[str] = []
    before = ""
    for place in where[: places or None]:
        source, row, number = place.rpartition(" row ")
        words.append(number if source == before else f"{source}{row}{number}")
        before = source
    return ", ".join(words) + (", …" if len(words) < len(where) else "")


def _length_lines(stats: RowStats, width: int, colour: bool) -> Iterator[Text]:
    """A histogram, and a table of averages and quantiles."""
    limit = stats.config.max_length
    sft = stats.method == "sft"
    what, unit = ("conversation", "rows") if sft else ("prompt with its longer response", "pairs")
    yield Text.assemble((f"tokens of a {what}, before cutting", "bold"), f" (max_length {limit:,})")
    bins = histogram(stats.whole, limit)
    labels = [f"{low:,}–{high:,}" if high is not None else f"{low:,} and more" for low, high, _ in bins]
    room, most = max(map(len, labels)), max(count for _, _, count in bins)
    size = max(10, min(_BAR, width - room - 36))
    yield Text(f"  {'':>{room}}  {'':<{size}}  {unit:>9}  {'share':>6}  {'so far':>6}")
    seen, total = 0, len(stats.whole)
    for label, (low, _, count) in zip(labels, bins):
        seen += count
        beyond = low > limit
        bar = ("█" if colour else "#") * max(round(count / most * size), int(count > 0))
        yield Text.assemble(
            f"  {label:>{room}}  ",
            (f"{bar:<{size}}", "yellow" if beyond else "green"),
            f"  {count:>9,}  {count / total:>6.1%}  {seen / total:>6.1%}" + ("  cut" if beyond else ""),
        )
    yield Text()
    rows = []
    for name, values in {"conversation" if sft else "prompt + longer response": stats.whole, **stats.parts}.items():
        quantiles = np.quantile(values, [0.5, 0.9, 0.99, 1], method="inverted_cdf")
        rows.append([name, f"{values.mean():,.0f}", *_numbers(*quantiles)])
    yield from _table(["tokens of", "mean", "median", "90 % ≤", "99 % ≤", "longest"], rows)
    if stats.parts:
        yield Text(f"  the chosen response is the longer one in {stats.chosen_longer:.1%} of the pairs")


def _budget_lines(stats: RowStats) -> Iterator[Text]:
    rows = []
    for b in stats.budgets:
        own = " ←" if b.max_length == stats.config.max_length else ""
        start = [f"{b.max_length:,}{own}", *_numbers(b.left_out, b.cut), f"{b.cut / len(stats.whole):.1%}"]
        rows.append([*start, *_numbers(b.lost, b.rows), f"{b.fill:.1%}", f"{b.steps:,}"])
    head = ["max_length", "left out", "cut", "share", "supervised lost", "packed rows", "full", "steps"]
    yield from _table(head, rows)


def _numbers(*values: int) -> list[str]:
    return [f"{value:,}" for value in values]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[Text]:
    """The first column is left-aligned, the others right-aligned."""
    sizes = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    for place, row in enumerate([head, *rows]):
        cells = [f"{row[0]:<{sizes[0]}}", *(f"{cell:>{size}}" for cell, size in zip(row[1:], sizes[1:]))]
        yield Text(("  " + "  ".join(cells)).rstrip(), style="bold" if place == 0 else "")


def _training_lines(stats: RowStats) -> Iterator[Text]:
    report, config = stats.report, stats.config
    yield Text("an epoch" if report.what == "training" else "an evaluation", style="bold")
    share = report.supervised / max(1, report.tokens)
    yield Text(
        f"  {report.tokens:,} tokens, {report.supervised:,} of them supervised ({share:.1%}, loss_on {config.loss_on})"
    )
    if report.fill is not None:
        unit = "rows"
        yield Text(
            f"  {report.rows:,} packed rows of {config.max_length:,} tokens, {report.fill:.1%} full; "
            f"{report.kept / report.rows:.1f} conversations in a row"
        )
    else:
        unit = "pairs"
        yield Text(f"  {report.rows:,} pairs; a pair's prompt is computed once")
    if report.what != "training":
        return
    tokens, supervised = report.tokens / stats.per_epoch, report.supervised / stats.per_epoch
    yield Text(
        f"  {stats.per_epoch:,} steps of {config.batch_size} {unit}, {tokens:,.0f} tokens ({supervised:,.0f} supervised) each"
    )
    why = f"max_steps {config.max_steps}" if config.max_steps else f"num_train_epochs {config.num_train_epochs:g}"
    yield Text(f"in all: {stats.steps:,} steps ({why}), about {tokens * stats.steps:,.0f} tokens", style="bold")
