"""``zephyr-lite data chat``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..monitor.console import Console
from .options import Verbose, nameable

console = Console()


class Format(StrEnum):
    parquet = "parquet"
    jsonl = "jsonl"


def chat(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Raw conversations: a file, a folder, or a hub id: stingning/ultrachat."),
    ],
    out: Annotated[Path, typer.Option("--out", callback=nameable, help="The folder to make.")],
    truecase: Annotated[
        bool, typer.Option("--truecase/--no-truecase", help="Restore capitals in dialogues that lack them.")
    ] = True,
    lexicon: Annotated[
        Path | None,
        typer.Option("--lexicon", help="Names from an earlier run's lexicon.txt, instead of learning them."),
    ] = None,
    refusals: Annotated[
        bool, typer.Option("--refusals/--no-refusals", help="Cut dialogues before a habitual refusal.")
    ] = True,
    near: Annotated[
        float,
        typer.Option("--near", help="Similarity of near duplicates; 0: exact duplicates only."),
    ] = 0.8,
    min_turns: Annotated[int, typer.Option("--min-turns", help="Drop dialogues of fewer turns.")] = 2,
    min_words: Annotated[int | None, typer.Option("--min-words", help="Drop dialogues of fewer words.")] = None,
    max_words: Annotated[int | None, typer.Option("--max-words", help="Drop dialogues of more words.")] = None,
    decontaminate: Annotated[
        list[str] | None,
        typer.Option("--decontaminate", help="Drop overlaps with this set: a file or hub id, NAME#SPLIT; repeatable."),
    ] = None,
    ngram: Annotated[int, typer.Option("--ngram", help="Words of an overlap.")] = 13,
    test: Annotated[
        float, typer.Option("--test", help="The test split: a share of the prompts, or a number of rows.")
    ] = 0.1,
    split: Annotated[str | None, typer.Option("--split", help="Split of the source, if it has several.")] = None,
    file_format: Annotated[Format, typer.Option("--format", help="File format.")] = Format.parquet,
    num_proc: Annotated[
        int | None, typer.Option("--num-proc", help="Number of processes; the result is the same.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
    verbose: Verbose = False,
) -> None:
    """Raw conversations (UltraChat) → a clean set like ultrachat_200k, with a report of every rule."""
    from ..data.workers import interruptible
    from ..io.redact import refuse_secrets
    from ..recipe.ultrachat import Options, clean_chat, report_lines

    # the report and dropped.tsv name them
    refuse_secrets({"SOURCE": source, "--decontaminate": decontaminate or []}, "the command line")
    options = Options(
        truecase=truecase,
        refusals=refusals,
        near=near or None,
        min_turns=min_turns,
        min_words=min_words,
        max_words=max_words,
        decontaminate=tuple(decontaminate or ()),
        ngram=ngram,
        test=test,
        lexicon=lexicon,
        file_format=file_format.value,
    )
    with interruptible():
        report = clean_chat(source, out, options, split=split, num_proc=num_proc, overwrite=overwrite)
    if report is None:
        console.say(f"{out} is complete already.")
    else:
        for line in report_lines(report):
            console.say(line)
        console.say(
            f"wrote {out}: {', '.join(report['files'][:4])}{', …' if len(report['files']) > 4 else ''}, and report.md"
        )
    console.say(f"Next: zephyr-lite sft dataset.path={out} dataset.split=train_sft")
