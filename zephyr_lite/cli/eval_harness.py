"""``zephyr-lite eval harness``: benchmarks by lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import Interrupted, UserError
from ..monitor.console import Console
from .options import AdapterBase, Adapters, ChatTemplateOption, EvalOut, Source, StageName, Verbose

console = Console()


def harness(
    source: Source = None,
    stage: StageName = None,
    adapter: Adapters = None,
    base: AdapterBase = None,
    chat_template: ChatTemplateOption = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", help="NAME or NAME:SHOTS, comma-separated \\[the paper's four, with its shots]."),
    ] = None,
    model: Annotated[list[str] | None, typer.Option("--model", help="base, sft, dpo …; repeatable \\[all].")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Number of questions of each task.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="\\[found on a GPU; 1 on a CPU]")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder with your own task files; their code runs.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask through the chat template; the paper did not.")
    ] = False,
    out: EvalOut = None,
    verbose: Verbose = False,
) -> None:
    """The paper's benchmarks (or others) by lm-evaluation-harness, on every model of the chain."""
    from ..evaluate.harness import HarnessSettings, Models, evaluate_harness, metrics, open_harness, read_tasks, table

    wanted = read_tasks(tasks or [])
    manager = open_harness(wanted, include_path)
    from ..evaluate.likelihood import roles
    from ..evaluate.results import claim_folder, head_of_live, result_folder, write_result
    from ..model.loaded import open_live

    live = open_live(source, stage=stage, adapters=adapter or [], base=base, chat_template=chat_template)
    names = list(dict.fromkeys(model or live.models))
    if unknown := [name for name in names if name not in live.models]:
        raise UserError(f"--model {unknown[0]}: {live.source} has no such model.", f"It has {', '.join(live.models)}.")
    settings = HarnessSettings(limit, apply_chat_template, batch_size, include_path)
    folder = result_folder(live.source, live.chain, out)
    claim_folder(folder)
    path = folder / f"{settings.kind}.json"

    def write(result: Models) -> None:
        write_result(folder, settings.kind, settings.body(result), head_of_live(live))

    try:
        result = evaluate_harness(live, wanted, settings, manager, models=names, earlier=path, on_task=write)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; finished tasks are in {path}, and the same command continues.") from None
    console.table(*table(wanted, result, roles(live)))
    console.say(f"percent ± standard error: {metrics(wanted, result)}")
    if limit is not None:
        console.say(f"a trial: at most {limit} questions per task, not comparable with published numbers")
    console.say(f"written to {path}")
