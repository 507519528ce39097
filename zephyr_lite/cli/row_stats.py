"""``zephyr-lite data stats``: lengths of rows, cut and dropped rows, packing, tokens and steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from rich.text import Text

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


def uncut_rows(rows: TrainedRows) -> TrainedRows:
    """The rows before cutting. If anything was cut, they are tokenized again without a limit."""
    report = rows.data.report
    if not report.cut and not any("max_length" in reason for reason in report.dropped):
        return rows
    free = rows.config.model_copy(update={"max_length": _UNCUT, "max_prompt_length": _UNCUT})
    return TrainedRows(rows.method, free, rows.template).prepare(report.what == "held-out")


def lengths_of(rows: TrainedRows) -> dict[str, np.ndarray]:
    """Tokens of each example, [n] int64: first what ``max_length`` bounds, then (pairs) its parts."""
    if rows.method == "sft":
        return {"conversation": rows.data.lengths}
    parts = {
        name: pc.list_value_length(rows.column(f"{name}_ids")).to_numpy().astype(np.int64)
        for name in ("prompt", "chosen", "rejected")
    }
    return {"prompt + longer response": parts["prompt"] + np.maximum(parts["chosen"], parts["rejected"]), **parts}


def budgets(rows: TrainedRows, uncut: TrainedRows) -> list[Budget]:
    """A quarter to four times ``max_length``, up to the first that cuts nothing."""
    own, lengths = rows.config.max_length, uncut.data.lengths
    sizes = [size for size in (own // 4, own // 2, own, own * 2, own * 4) if size >= 2]
    # [n, sizes + 1] supervised tokens among the first ones of each example; in the last column all of them
    places = (np.flatnonzero(mask.values) for mask in uncut.column("mask"))
    within = np.array([np.searchsorted(supervised, [*sizes, _UNCUT]) for supervised in places])
    found = []
    for max_length, inside in zip(sizes, within.T):
        kept = inside > 0
        if not kept.any():
            continue
        short = np.minimum(lengths[kept], max_length)
        packed = len(best_fit(short, max_length))
        cut = kept & (lengths > max_length)
        lost = int((within[:, -1] - inside)[cut].sum())
        fill, steps = float(short.sum() / (packed * max_length)), step_schedule(rows.config, packed)[1]
        found.append(Budget(max_length, int((~kept).sum()), int(cut.sum()), lost, packed, fill, steps))
        if not cut.any() and kept.all() and max_length >= own:
            break
    return found


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


def stats_lines(rows: TrainedRows, *, width: int, colour: bool, places: int = 5) -> Iterator[Text]:
    """The statistics as lines.

    Args:
        width: in cells.
        colour: bars of blocks in colour, for a terminal; else of ``#``.
        places: the number of places to name for each reason; 0: all.
    """
    report, uncut = rows.data.report, uncut_rows(rows)
    yield Text(f"{report.what} data, {rows.method}", style="bold")
    for note in report.notes:
        yield Text(f"  {note}")
    yield from _left_out_lines(rows, places)
    yield Text()
    yield from _length_lines(rows, lengths_of(uncut), width, colour)
    if rows.method == "sft" and report.what == "training":
        yield Text()
        yield from _budget_lines(rows, uncut)
    yield from _source_lines(rows)
    yield Text()
    yield from _training_lines(rows)


def _left_out_lines(rows: TrainedRows, places: int) -> Iterator[Text]:
    report = rows.data.report
    for reasons, style, before in ((report.dropped, "red", "left out, "), (report.changed, "yellow", "changed, ")):
        for reason, where in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
            yield Text.assemble(("  " + before, style), f"{reason}: {len(where):,} ({_named(where, places)})")
    columns = (rows.column(name).to_pylist() for name in ("where", "cut", "lost"))
    cut = [f"{place} −{lost:,}" if lost else place for place, was_cut, lost in zip(*columns) if was_cut]
    if cut:
        unit = "conversations" if rows.method == "sft" else "pairs"
        prompts = f" ({report.prompts_cut:,} of them on the prompt's left)" if report.prompts_cut else ""
        yield Text.assemble(
            (f"  cut to max_length {rows.config.max_length:,}", "yellow"),
            f": {len(cut):,} {unit}{prompts}, −{report.supervised_lost:,} supervised tokens ({_named(cut, places)})",
        )
    if not (report.dropped or report.changed or cut):
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


def _length_lines(rows: TrainedRows, lengths: dict[str, np.ndarray], width: int, colour: bool) -> Iterator[Text]:
    """A histogram, and a table of averages and quantiles."""
    limit, whole = rows.config.max_length, next(iter(lengths.values()))
    what, unit = ("conversation", "rows") if rows.method == "sft" else ("prompt with its longer response", "pairs")
    yield Text.assemble((f"tokens of a {what}, before cutting", "bold"), f" (max_length {limit:,})")
    bins = histogram(whole, limit)
    labels = [f"{low:,}–{high:,}" if high is not None else f"{low:,} and more" for low, high, _ in bins]
    room, most = max(map(len, labels)), max(count for _, _, count in bins)
    size = max(10, min(_BAR, width - room - 36))
    yield Text(f"  {'':>{room}}  {'':<{size}}  {unit:>9}  {'share':>6}  {'so far':>6}")
    seen, total = 0, len(whole)
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
    table = [["tokens of", "mean", "median", "90 % ≤", "99 % ≤", "longest"]]
    for name, values in lengths.items():
        quantiles = np.quantile(values, [0.5, 0.9, 0.99, 1], method="inverted_cdf")
        table.append([name, f"{values.mean():,.0f}", *(f"{value:,}" for value in quantiles)])
    yield from _table(table)
    if rows.method == "dpo":
        share = (lengths["chosen"] > lengths["rejected"]).mean()
        yield Text(f"  the chosen response is the longer one in {share:.1%} of the pairs")


def _budget_lines(rows: TrainedRows, uncut: TrainedRows) -> Iterator[Text]:
    table = [["max_length", "left out", "cut", "share", "supervised lost", "packed rows", "full", "steps"]]
    for b in budgets(rows, uncut):
        own = " ←" if b.max_length == rows.config.max_length else ""
        counts = [f"{b.max_length:,}{own}", f"{b.left_out:,}", f"{b.cut:,}", f"{b.cut / len(uncut.data.lengths):.1%}"]
        table.append([*counts, f"{b.lost:,}", f"{b.rows:,}", f"{b.fill:.1%}", f"{b.steps:,}"])
    yield from _table(table)


def _source_lines(rows: TrainedRows) -> Iterator[Text]:
    """Of a mixture: each source's examples, dropped and cut rows, and tokens of an epoch."""
    counts: dict[str, np.ndarray] = {}  # source → kept, left out, cut, tokens, supervised

    def add(place: str, *numbers: int) -> None:
        source = place.rpartition(" row ")[0]
        counts[source] = counts.get(source, np.zeros(5, dtype=np.int64)) + np.array(numbers)

    columns = (rows.column(name).to_pylist() for name in ("where", "length", "supervised", "cut"))
    for place, length, supervised, cut in zip(*columns):
        add(place, 1, 0, bool(cut), length, supervised)
    for place in (place for where in rows.data.report.dropped.values() for place in where):
        add(place, 0, 1, 0, 0, 0)
    if len(counts) < 2:
        return
    table = [["source", "kept", "left out", "cut", "tokens", "supervised", "share"]]
    for source, found in counts.items():
        table.append([source, *(f"{count:,}" for count in found), f"{found[3] / rows.data.report.tokens:.1%}"])
    yield Text()
    yield from _table(table)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[Text]:
    """A head and rows; the first column is left-aligned, the others right-aligned."""
    sizes = [max(map(len, column)) for column in zip(*rows)]
    for place, row in enumerate(rows):
        cells = [f"{row[0]:<{sizes[0]}}", *(f"{cell:>{size}}" for cell, size in zip(row[1:], sizes[1:]))]
        yield Text(("  " + "  ".join(cells)).rstrip(), style="bold" if place == 0 else "")


def _training_lines(rows: TrainedRows) -> Iterator[Text]:
    report, config = rows.data.report, rows.config
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
    per_epoch, steps = step_schedule(config, len(rows.data.rows))
    tokens, supervised = report.tokens / per_epoch, report.supervised / per_epoch
    yield Text(
        f"  {per_epoch:,} steps of {config.batch_size} {unit}, {tokens:,.0f} tokens ({supervised:,.0f} supervised) each"
    )
    why = f"max_steps {config.max_steps}" if config.max_steps else f"num_train_epochs {config.num_train_epochs:g}"
    yield Text(f"in all: {steps:,} steps ({why}), about {tokens * steps:,.0f} tokens", style="bold")
