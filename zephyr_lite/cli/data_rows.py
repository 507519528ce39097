"""``zephyr-lite data show`` and ``zephyr-lite data stats``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..monitor.console import Console
from .options import StageConfig, Verbose

console = Console()


def show(
    context: typer.Context,
    config: StageConfig = None,
    row: Annotated[
        int | None,
        typer.Option("--row", help="The number of a packed row (sft) or a pair (dpo); the first by default."),
    ] = None,
    place: Annotated[
        str | None,
        typer.Option("--from", help="Instead: one row of the source; 17, or 'train.jsonl row 17'."),
    ] = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="A row of eval_dataset.")] = False,
    table: Annotated[bool, typer.Option("--table", help="One token a line.")] = False,
    verbose: Verbose = False,
) -> None:
    """A row as training sees it, token by token; needs the base's tokenizer and config.json, no weights."""
    from ..errors import UserError
    from .rows import open_rows, segments_from, segments_of_row, stage_of_words, table_lines, view_lines

    if row is not None and place is not None:
        raise UserError("--row and --from: both name a row.", "Leave one out.")
    method, words = stage_of_words(list(context.args), config)
    rows = open_rows(method, config, words, held_out=held_out)
    for note in rows.notes:
        console.say(f"note: {note}")
    if place is not None:
        number, segments = segments_from(rows, place)
    else:
        number = 1 if row is None else row
        segments = segments_of_row(rows, number)
    if table:
        lines = table_lines(rows, number, segments, colour=_has_colour())
    else:
        lines = view_lines(rows, number, segments, console.out.width, colour=_has_colour())
    for line in lines:
        console.out.print(line)


def stats(
    context: typer.Context,
    config: StageConfig = None,
    places: Annotated[
        int, typer.Option("--places", min=0, help="Rows to name for each reason to leave out or cut; 0: all.")
    ] = 5,
    verbose: Verbose = False,
) -> None:
    """Lengths, cut and left out rows, packing, tokens and steps; needs no weights."""
    from .row_stats import measure, stats_lines
    from .rows import held_out_rows, open_rows, stage_of_words

    method, words = stage_of_words(list(context.args), config)
    opened = open_rows(method, config, words)
    for note in opened.notes:
        console.say(f"note: {note}")
    for each in (opened, held_out_rows(opened)) if opened.config.eval_dataset else (opened,):
        console.say()
        for line in stats_lines(measure(each), width=console.out.width, colour=_has_colour(), places=places):
            console.out.print(line)


def _has_colour() -> bool:
    return console.out.is_terminal and console.out.color_system is not None
