"""``zephyr-lite data show``."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import Console
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
    from .row_view import segments_from, segments_of_row, table_lines, view_lines
    from .trained_rows import open_rows, stage_of_words

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
    colour = console.out.is_terminal and console.out.color_system is not None
    if table:
        lines = table_lines(rows, number, segments, colour=colour)
    else:
        lines = view_lines(rows, number, segments, console.out.width, colour=colour)
    for line in lines:
        console.out.print(line)
