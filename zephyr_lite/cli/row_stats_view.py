"""``zephyr-lite data stats`` in lines: headings, tables and bars, in colour in a terminal, in ASCII in a pipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from .row_stats import RowStats, histogram

_EIGHTHS = " ▏▎▍▌▋▊▉"
_BAR = 40


def stats_lines(stats: RowStats, *, width: int, colour: bool, places: int = 5) -> Iterator[Text]:
    """Everything, a line at a time.

    Args:
        stats: of ``row_stats.measure``.
        width: in cells.
        colour: of a terminal; else bars are made of ``#``.
        places: how many places to name for each reason; 0: all.
    """
    yield Text(f"{stats.report.what} data, {stats.method}", style="bold")
    for note in stats.report.notes:
        yield Text(f"  {note}")
    yield from _left_out(stats, places)
    yield Text()
    yield from _lengths(stats, width, colour)
    yield from _summaries(stats)
    if stats.budgets:
        yield Text()
        yield from _budgets(stats)
    if len(stats.sources) > 1:
        yield Text()
        yield from _sources(stats)
    yield Text()
    yield from _training(stats)


def _left_out(stats: RowStats, places: int) -> Iterator[Text]:
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


def _lengths(stats: RowStats, width: int, colour: bool) -> Iterator[Text]:
    limit = stats.config.max_length
    what = "conversation" if stats.method == "sft" else "prompt with its longer response"
    whole = stats.whole.values
    yield Text.assemble((f"tokens of a {what}, before cutting", "bold"), f" (max_length {limit:,})")
    bins = histogram(whole, limit)
    labels = [f"{low:,}–{high:,}" if high is not None else f"{low:,} and more" for low, high, _ in bins]
    room, most = max(map(len, labels)), max(count for _, _, count in bins)
    size = max(10, min(_BAR, width - room - 36))
    unit = "rows" if stats.method == "sft" else "pairs"
    yield Text(f"  {'':>{room}}  {'':<{size}}  {unit:>9}  {'share':>6}  {'so far':>6}")
    seen = 0
    for label, (low, _, count) in zip(labels, bins):
        seen += count
        beyond = low > limit
        bar = _bar(count / most * size, colour)
        yield Text.assemble(
            f"  {label:>{room}}  ",
            (f"{bar:<{size}}", "yellow" if beyond else "green"),
            f"  {count:>9,}  {count / len(whole):>6.1%}  {seen / len(whole):>6.1%}" + ("  cut" if beyond else ""),
        )


def _bar(cells: float, colour: bool) -> str:
    if not colour:
        return "#" * max(round(cells), int(cells > 0))
    whole, eighth = divmod(max(round(cells * 8), int(cells > 0)), 8)
    return "█" * whole + (_EIGHTHS[eighth] if eighth else "")


def _summaries(stats: RowStats) -> Iterator[Text]:
    rows = []
    for lengths in [stats.whole, *stats.parts]:
        mean, *others = lengths.summary()
        rows.append([lengths.name, f"{mean:,.0f}", *(f"{value:,}" for value in others)])
    yield Text()
    yield from _table(["tokens of", "mean", "median", "90 % ≤", "99 % ≤", "longest"], rows)
    if stats.parts:
        yield Text(f"  the chosen response is the longer one in {stats.chosen_longer:.1%} of the pairs")


def _budgets(stats: RowStats) -> Iterator[Text]:
    count = len(stats.whole.values)
    rows = []
    for budget in stats.budgets:
        own = " ←" if budget.max_length == stats.config.max_length else ""
        rows.append(
            [
                f"{budget.max_length:,}{own}",
                f"{budget.left_out:,}",
                f"{budget.cut:,}",
                f"{budget.cut / count:.1%}",
                f"{budget.lost:,}",
                f"{budget.rows:,}",
                f"{budget.fill:.1%}",
                f"{budget.steps:,}",
            ]
        )
    head = ["max_length", "left out", "cut", "share", "supervised lost", "packed rows", "full", "steps"]
    yield from _table(head, rows)


def _sources(stats: RowStats) -> Iterator[Text]:
    total = sum(source.tokens for source in stats.sources.values())
    rows = [
        [
            name,
            f"{s.kept:,}",
            f"{s.left_out:,}",
            f"{s.cut:,}",
            f"{s.tokens:,}",
            f"{s.tokens / max(1, total):.1%}",
            f"{s.supervised:,}",
        ]
        for name, s in stats.sources.items()
    ]
    yield from _table(["source", "kept", "left out", "cut", "tokens", "share", "supervised"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[Text]:
    """The first column to the left, numbers to the right."""
    sizes = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    for place, row in enumerate([head, *rows]):
        cells = [f"{row[0]:<{sizes[0]}}", *(f"{cell:>{size}}" for cell, size in zip(row[1:], sizes[1:]))]
        yield Text(("  " + "  ".join(cells)).rstrip(), style="bold" if place == 0 else "")


def _training(stats: RowStats) -> Iterator[Text]:
    report, config = stats.report, stats.config
    yield Text("an epoch" if report.what == "training" else "an evaluation", style="bold")
    share = report.supervised / max(1, report.tokens)
    yield Text(
        f"  {report.tokens:,} tokens, {report.supervised:,} of them supervised ({share:.1%}, loss_on {config.loss_on})"
    )
    if report.fill is not None:
        yield Text(
            f"  {stats.rows:,} packed rows of {config.max_length:,} tokens, {report.fill:.1%} full; "
            f"{report.kept / stats.rows:.1f} conversations in a row"
        )
    else:
        yield Text(f"  {stats.rows:,} pairs; a pair's prompt is computed once")
    if report.what != "training":
        return
    unit = "rows" if stats.method == "sft" else "pairs"
    yield Text(
        f"  {stats.per_epoch:,} steps of {config.batch_size} {unit}, "
        f"{report.tokens / stats.per_epoch:,.0f} tokens ({report.supervised / stats.per_epoch:,.0f} supervised) each"
    )
    why = f"max_steps {config.max_steps}" if config.max_steps else f"num_train_epochs {config.num_train_epochs:g}"
    whole = report.tokens / stats.per_epoch * stats.steps
    yield Text(f"in all: {stats.steps:,} steps ({why}), about {whole:,.0f} tokens", style="bold")
