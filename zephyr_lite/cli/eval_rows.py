"""``zephyr-lite eval loss`` and ``eval preference``: held-out rows, and every model of the chain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Interrupted
from ..monitor.console import Console
from .options import AdapterBase, Adapters, ChatTemplateOption, EvalOut, Source, StageName, Verbose

if TYPE_CHECKING:
    from ..evaluate.bootstrap import Bootstrap
    from ..evaluate.likelihood import Evaluation
    from ..evaluate.rows import HeldOut
    from ..model.loaded import LoadedModel

console = Console()

Data = Annotated[str | None, typer.Option("--data", help="A file, folder or hub id \\[the stage's eval_dataset].")]
Split = Annotated[str | None, typer.Option("--split", help="Split of --data.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Number of rows of each data set, drawn at random.")]
Resamples = Annotated[int, typer.Option("--resamples", min=100, max=1_000_000, help="Number of bootstrap resamples.")]
Confidence = Annotated[
    float, typer.Option("--confidence", min=0.5, max=0.999, help="Confidence level of the intervals.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Random seed of the bootstrap.")]


def loss(
    source: Source = None,
    stage: StageName = None,
    adapter: Adapters = None,
    base: AdapterBase = None,
    chat_template: ChatTemplateOption = None,
    data: Data = None,
    split: Split = None,
    limit: Limit = None,
    resamples: Resamples = 1000,
    confidence: Confidence = 0.95,
    seed: Seed = 0,
    out: EvalOut = None,
    verbose: Verbose = False,
) -> None:
    """Loss and perplexity on held-out conversations: policy, reference and base, with confidence intervals."""
    live, rows, folder = _open("sft", source, stage, adapter, base, chat_template, data, split, limit, out)
    from ..evaluate.bootstrap import Bootstrap
    from ..evaluate.likelihood import evaluate_loss

    bootstrap = Bootstrap(resamples, confidence, seed)
    _show_and_write("loss", evaluate_loss(live, rows, bootstrap), live, rows, folder, bootstrap)


def preference(
    source: Source = None,
    stage: StageName = None,
    adapter: Adapters = None,
    base: AdapterBase = None,
    chat_template: ChatTemplateOption = None,
    data: Data = None,
    split: Split = None,
    limit: Limit = None,
    beta: Annotated[float | None, typer.Option("--beta", min=1e-9, help="β of the margin \\[the DPO stage's].")] = None,
    resamples: Resamples = 1000,
    confidence: Confidence = 0.95,
    seed: Seed = 0,
    out: EvalOut = None,
    verbose: Verbose = False,
) -> None:
    """Accuracy and margin on held-out preference pairs: policy against reference and base, with confidence intervals."""
    live, rows, folder = _open("dpo", source, stage, adapter, base, chat_template, data, split, limit, out)
    from ..evaluate.bootstrap import Bootstrap
    from ..evaluate.likelihood import evaluate_preference

    bootstrap = Bootstrap(resamples, confidence, seed)
    result = evaluate_preference(live, rows, bootstrap, beta=beta)
    _show_and_write("preference", result, live, rows, folder, bootstrap)


def _open(
    method: Any,
    source: Path | None,
    stage: str | None,
    adapter: list[str] | None,
    base: str | None,
    chat_template: str | None,
    data: str | None,
    split: str | None,
    limit: int | None,
    out: Path | None,
) -> tuple[LoadedModel, HeldOut, Path]:
    """The models, the rows, and the folder of the result, which is created before anything is computed."""
    from ..evaluate.results import claim_folder, result_folder
    from ..evaluate.rows import held_out
    from ..model.loaded import open_live

    live = open_live(source, stage=stage, adapters=adapter or [], base=base, chat_template=chat_template)
    folder = result_folder(live.source, live.chain, out)
    console.say(f"{live.source}: {', '.join(live.models)}")
    rows = held_out(live.chain, live.template, method, data=data, split=split, limit=limit)
    for line in rows.data.report.lines():
        console.say(line)
    claim_folder(folder)
    return live, rows, folder


def _show_and_write(
    kind: str, result: Evaluation, live: LoadedModel, rows: HeldOut, folder: Path, bootstrap: Bootstrap
) -> None:
    """Print the tables and write the result. A result without some models is a file of its own.

    Raises:
        Interrupted: models are missing.
    """
    from ..evaluate.results import head_of_live, write_result

    for header, lines in result.tables:
        if lines:
            console.table(header, lines)
    n, unit = len(rows.data.lengths), "conversation" if rows.method == "sft" else "pair"
    if n == 1:
        console.say(f"one {unit} has no interval")
    else:
        level, draws = f"{bootstrap.level:.1%}", f"{bootstrap.resamples:,}"
        console.say(f"in brackets: {level} intervals, {draws} bootstrap draws over {n:,} {unit}s")
    for note in result.notes:
        console.say(note)
    name, head = rows.kind(kind), head_of_live(live)
    if not result.missing:
        console.say(f"written to {write_result(folder, name, result.body, head)}")
        return
    path = write_result(folder, f"{name}-partial", {**result.body, "missing": result.missing}, head)
    raise Interrupted(f"interrupted before {' and '.join(result.missing)}; the other models' results are in {path}")
