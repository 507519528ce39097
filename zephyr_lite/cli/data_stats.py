"""``zephyr-lite data stats``."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import Console
from .options import StageConfig, Verbose

console = Console()


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
    from .trained_rows import held_out_rows, open_rows, stage_of_words

    method, words = stage_of_words(list(context.args), config)
    opened = open_rows(method, config, words)
    for note in opened.notes:
        console.say(f"note: {note}")
    colour = console.out.is_terminal and console.out.color_system is not None
    for each in (opened, held_out_rows(opened)):
        if each is None:
            continue
        console.say()
        for line in stats_lines(measure(each), width=console.out.width, colour=colour, places=places):
            console.out.print(line)
