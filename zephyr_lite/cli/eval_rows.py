"""``zephyr-lite eval loss`` and ``eval preference``: held-out rows, and every model of the chain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Interrupted
from .console import Console
from .options import AdapterBase, Adapters, ChatTemplateOption, EvalOut, Source, StageName, Verbose

if TYPE_CHECKING:
    from ..evaluate.rows import HeldOut
    from ..model.loaded import LoadedModel

console = Console()

Data = Annotated[
    str | None, typer.Option("--data", help="A file, folder or hub id \\[the eval_dataset that the stage held out].")
]
Split = Annotated[str | None, typer.Option("--split", help="Of --data.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="So many rows of each data set, by a seeded draw.")]
Resamples = Annotated[int, typer.Option("--resamples", min=100, max=1_000_000, help="Draws of the bootstrap.")]
Confidence = Annotated[float, typer.Option("--confidence", min=0.5, max=0.999, help="Of the intervals.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the bootstrap's draws.")]


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
    from ..evaluate.loss import DIFFERENCES, HEADER, evaluate_loss

    result = evaluate_loss(live, rows, bootstrap=Bootstrap(resamples, confidence, seed), say=console.say)
    console.table(HEADER, result.rows())
    if result.differences:
        console.table(DIFFERENCES, result.difference_rows())
    _explain_intervals(rows, confidence, resamples)
    _keep(folder, rows.kind("loss"), result, live)


def preference(
    source: Source = None,
    stage: StageName = None,
    adapter: Adapters = None,
    base: AdapterBase = None,
    chat_template: ChatTemplateOption = None,
    data: Data = None,
    split: Split = None,
    limit: Limit = None,
    beta: Annotated[float | None, typer.Option("--beta", min=1e-9, help="Of the margin \\[the DPO stage's].")] = None,
    resamples: Resamples = 1000,
    confidence: Confidence = 0.95,
    seed: Seed = 0,
    out: EvalOut = None,
    verbose: Verbose = False,
) -> None:
    """Accuracy and margin on held-out preference pairs: policy against reference and base, with confidence intervals."""
    live, rows, folder = _open("dpo", source, stage, adapter, base, chat_template, data, split, limit, out)
    from ..evaluate.bootstrap import Bootstrap
    from ..evaluate.preference import HEADER, LIKELIER, evaluate_preference

    result = evaluate_preference(
        live, rows, beta=beta, bootstrap=Bootstrap(resamples, confidence, seed), say=console.say
    )
    if result.comparisons:
        console.table(HEADER, result.rows())
    console.table(LIKELIER, result.likelier_rows())
    _explain_intervals(rows, confidence, resamples)
    if result.beta is None and result.comparisons:
        console.say("margins are in nats alone: no DPO stage says what β is (--beta)")
    _keep(folder, rows.kind("preference"), result, live)


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
    """The models, the rows, and the folder of the result, which is known to be there before anything is computed."""
    from ..evaluate.results import claim_folder, result_folder
    from ..evaluate.rows import held_out
    from ..model.loaded import open_live

    live = open_live(
        source, stage=stage, adapters=adapter or [], base=base, chat_template=chat_template, say=console.say
    )
    folder = result_folder(live, out)
    console.say(f"{live.source}: {', '.join(live.models)}")
    rows = held_out(live.chain, live.template, method, data=data, split=split, limit=limit, say=console.say)
    for line in rows.data.report.lines():
        console.say(line)
    claim_folder(folder)
    return live, rows, folder


def _explain_intervals(rows: HeldOut, confidence: float, resamples: int) -> None:
    n, unit = len(rows.data.lengths), "conversation" if rows.method == "sft" else "pair"
    if n == 1:
        console.say(f"one {unit} has no interval")
    else:
        console.say(f"in brackets: {confidence:.1%} intervals, {resamples:,} bootstrap draws over {n:,} {unit}s")


def _keep(folder: Path, kind: str, result: Any, live: LoadedModel) -> None:
    """Write the result; one that was interrupted lies beside, and replaces no complete one.

    Raises:
        Interrupted: it was.
    """
    from ..evaluate.results import write_result

    if not result.missing:
        console.say(f"written to {write_result(folder, kind, result.body(), live)}")
        return
    path = write_result(folder, f"{kind}-partial", {**result.body(), "missing": result.missing}, live)
    raise Interrupted(f"interrupted before {' and '.join(result.missing)}; what is there is in {path}")
