"""``zephyr-lite ablate``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import UserError
from ..monitor.console import Console
from .options import Verbose

console = Console()


def ablate(
    context: typer.Context,
    out: Annotated[str | None, typer.Option("--out", help="Folder of all stages; the table's by default.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="One arm of the table; repeatable.")] = None,
    chat: Annotated[
        str | None, typer.Option("--chat", help="Folder or id to use for HuggingFaceH4/ultrachat_200k.")
    ] = None,
    preferences: Annotated[
        str | None,
        typer.Option("--preferences", help="Folder or id to use for HuggingFaceH4/ultrafeedback_binarized."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print arms, stages and keys; train nothing.")] = False,
    verbose: Verbose = False,
) -> None:
    """Compare several ways through the recipe on one base: recipe (the default), alpha-beta, or a file."""
    from ..recipe.ablations import read_table

    words = list(context.args)
    name = words.pop(0) if words and "=" not in words[0] and not words[0].startswith("-") else "recipe"
    table = read_table(name, words, out=out, only=only or [], chat=chat, preferences=preferences)
    if dry_run:
        for arm, stages in table.arms.items():
            console.say(f"{arm}: {' → '.join(stage.name for stage in stages)}")
        for stage in table.stages():
            console.heading(f"{stage.name} ({stage.method}, {stage.file})")
            for note in stage.loaded.notes:
                console.say(f"  {note}")
            config = stage.loaded.config.model_dump(mode="json", exclude_defaults=True)
            for key, value in config.items():
                console.say(f"  {key}: {value}")
        return
    from ..recipe.ablations import HEADER, legend, run_ablation, table_rows

    if any(stage.loaded.config.engine == "unsloth" for stage in table.stages()):
        raise UserError("engine unsloth patches the libraries of its process.", "Use engine=fused or engine=trl here.")
    result = run_ablation(table, on_metrics=console.metrics)
    console.table(HEADER, table_rows(result))
    for line in legend(result):
        console.say(line)
