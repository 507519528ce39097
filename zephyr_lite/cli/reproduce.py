"""``zephyr-lite reproduce``: a recipe from its first step to a row of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..io.redact import refuse_secrets
from ..monitor.console import Console
from .options import Verbose, nameable

console = Console()


def reproduce(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option("--out", callback=nameable, help="The run's folder \\[the recipe's].")
    ] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="MT-Bench too, graded by URL#MODEL of a server, or by a folder.")
    ] = None,
    who: Annotated[str, typer.Option("--who", help="Your name in the row.")] = "anonymous",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands; start nothing.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run a recipe, overnight (the default) or full: both stages, merge, evaluation, report, and its row of results."""
    words = list(context.args)
    named = bool(words) and "=" not in words[0] and not words[0].startswith("-")
    recipe = words.pop(0) if named else "overnight"
    # they are written into results.json
    refuse_secrets({"--judge": judge or "", "--who": who, "--out": str(out or "")}, "the command line")
    from ..demo.reproduce import command_line, plan_reproduction, run_reproduction

    chosen = plan_reproduction(recipe, words, out=out, judge=judge, who=who)
    if dry_run:
        for _, command in chosen.commands:
            console.say(command_line(command))
        return
    run_reproduction(chosen)
