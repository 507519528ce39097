"""``zephyr-lite data pairs``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..monitor.console import Console
from .options import Verbose, nameable

console = Console()


class ChosenBy(StrEnum):
    mean = "mean"
    overall = "overall"


class Rejected(StrEnum):
    random = "random"
    worst = "worst"
    margin = "margin"


class SystemPrompt(StrEnum):
    omit = "omit"
    keep = "keep"


class Format(StrEnum):
    parquet = "parquet"
    jsonl = "jsonl"


def pairs(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Files, folders or hub ids: openbmb/UltraFeedback.")
    ],
    out: Annotated[Path, typer.Option("--out", callback=nameable, help="The folder to make.")],
    chosen_by: Annotated[
        ChosenBy,
        typer.Option(
            "--chosen-by", help="mean: of the aspects (the paper). overall: overall_score (published script)."
        ),
    ] = ChosenBy.mean,
    rejected: Annotated[
        Rejected,
        typer.Option(
            "--rejected", help="A random one of the others, the worst, or a random one at least --margin below."
        ),
    ] = Rejected.random,
    margin: Annotated[
        float | None,
        typer.Option("--margin", help="With --rejected margin: points below the chosen one, at least [1]."),
    ] = None,
    system_prompt: Annotated[
        SystemPrompt,
        typer.Option("--system-prompt", help="keep: the chosen one's as system turn; rejected has the same."),
    ] = SystemPrompt.omit,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            help="Excluded questions: a file or hub id (ID, ID:SPLIT, ID:NAME:SPLIT); repeatable.",
        ),
    ] = None,
    test: Annotated[
        float | None, typer.Option("--test", help="Pairs to hold out: a number, or a share [2000, at most 5 %].")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split of the input, if it has several.")] = None,
    file_format: Annotated[Format, typer.Option("--format", help="File format.")] = Format.parquet,
    seed: Annotated[int, typer.Option("--seed", help="Random seed.")] = 42,
    num_proc: Annotated[
        int | None, typer.Option("--num-proc", help="Number of processes; the result is the same.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
    verbose: Verbose = False,
) -> None:
    """Scored completions (UltraFeedback's raw schema) → preference pairs like ultrafeedback_binarized."""
    from ..config.load import DatasetSpec
    from ..errors import UserError
    from ..io.redact import refuse_secrets
    from ..recipe.ultrafeedback import TRAIN, PairRules, make_pairs

    # the report and dropped.tsv name them
    refuse_secrets({"SOURCE": list(inputs), "--exclude": exclude or []}, "the command line")
    if margin is not None and rejected is not Rejected.margin:
        raise UserError(f"--margin {margin:g} means nothing to --rejected {rejected}.", "Add --rejected margin.")
    report = make_pairs(
        [DatasetSpec(path=name, split=split) for name in inputs],
        out,
        PairRules(chosen_by.value, rejected.value, 1.0 if margin is None else margin, system_prompt.value, seed),
        exclude=exclude or [],
        test=test,
        file_format=file_format.value,
        num_proc=num_proc,
        overwrite=overwrite,
    )
    if report is None:
        console.say(f"{out} is complete already.")
    else:
        for line in report.lines():
            console.say(line)
        console.say(f"wrote {out}: {', '.join(report.files)}, report.md, report.json and dropped.tsv")
    console.say(f"Next: zephyr-lite dpo dataset.path={out} dataset.split={TRAIN}")
