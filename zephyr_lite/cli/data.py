"""``zephyr-lite data``: make data sets (chat, pairs), and look at them as training does (show, stats)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Context, Option

from ..errors import UserError
from .options import FileFormat, NewFolder, NumProc, Replace, StageConfig, console, next_lines, say_all


def chat(
    context: Context,
    source: Annotated[
        str, Argument(metavar="SOURCE", help="Raw conversations: a file, a folder, or a hub id: stingning/ultrachat.")
    ],
    out: NewFolder,
    truecase: Annotated[bool, Option(help="Restore capitals in dialogues that lack them.")] = True,
    lexicon: Annotated[
        Path | None, Option(help="Names from an earlier run's lexicon.txt, instead of learning them.")
    ] = None,
    refusals: Annotated[bool, Option(help="Cut dialogues before a habitual refusal.")] = True,
    near: Annotated[float, Option(help="Similarity of near duplicates; 0: exact duplicates only.")] = 0.8,
    min_turns: Annotated[int, Option(help="Drop dialogues of fewer turns.")] = 2,
    min_words: Annotated[int | None, Option(help="Drop dialogues of fewer words.")] = None,
    max_words: Annotated[int | None, Option(help="Drop dialogues of more words.")] = None,
    decontaminate: Annotated[
        list[str] | None, Option(help="Drop overlaps with this set: a file or hub id, NAME#SPLIT; repeatable.")
    ] = None,
    ngram: Annotated[int, Option(help="Words of an overlap.")] = 13,
    test: Annotated[float, Option(help="The test split: a share of the prompts, or a number of rows.")] = 0.1,
    split: Annotated[str | None, Option(help="Split of the source, if it has several.")] = None,
    file_format: FileFormat = "parquet",
    num_proc: NumProc = None,
    overwrite: Replace = False,
) -> None:
    """Raw conversations (UltraChat) → a clean set like ultrachat_200k, with a report of every rule."""
    from ..client.endpoints import validated
    from ..data.workers import interruptible
    from ..io.redact import refuse_secrets
    from ..recipe.ultrachat import Options, clean_chat, report_lines

    if lexicon is not None and not truecase:
        raise UserError("--lexicon has no effect with --no-truecase.", "Leave one of the two options out.")
    # the report and dropped.tsv name them
    refuse_secrets({"SOURCE": source, "--decontaminate": decontaminate or []}, "the command line")
    values = {**{key: context.params[key] for key in Options.model_fields}, "near": near or None}
    values["decontaminate"] = decontaminate or ()
    options = validated(Options, values, "the command line")
    with interruptible():
        report = clean_chat(source, out, options, split=split, num_proc=num_proc, overwrite=overwrite)
    if report is None:
        console.say(f"{out} is complete already.")
    else:
        _say_made(out, report_lines(report), report["files"], "report.md")
    console.say(next_lines(["sft", f"dataset.path={out}", "dataset.split=train_sft"]))


def pairs(
    inputs: Annotated[
        list[str], Argument(metavar="INPUT...", help="Files, folders or hub ids: openbmb/UltraFeedback.")
    ],
    out: NewFolder,
    chosen_by: Annotated[
        Literal["mean", "overall"],
        Option(help="mean: of the aspects (the paper). overall: overall_score (published script)."),
    ] = "mean",
    rejected: Annotated[
        Literal["random", "worst", "margin"],
        Option(help="A random one of the others, the worst, or a random one at least --margin below."),
    ] = "random",
    margin: Annotated[
        float | None, Option(help="With --rejected margin: points below the chosen one, at least [1].")
    ] = None,
    system_prompt: Annotated[
        Literal["omit", "keep"], Option(help="keep: the chosen one's as system turn; rejected has the same.")
    ] = "omit",
    exclude: Annotated[
        list[str] | None,
        Option(help="Excluded questions: a file or hub id (ID, ID:SPLIT, ID:NAME:SPLIT); repeatable."),
    ] = None,
    test: Annotated[float | None, Option(help="Pairs to hold out: a number, or a share [2000, at most 5 %].")] = None,
    split: Annotated[str | None, Option(help="Split of the input, if it has several.")] = None,
    file_format: FileFormat = "parquet",
    seed: Annotated[int, Option(help="Random seed.")] = 42,
    num_proc: NumProc = None,
    overwrite: Replace = False,
) -> None:
    """Scored completions (UltraFeedback's raw schema) → preference pairs like ultrafeedback_binarized."""
    from ..io.redact import refuse_secrets
    from ..recipe.ultrafeedback import TRAIN, PairRules, make_pairs, report_lines

    # the report and dropped.tsv name them
    refuse_secrets({"SOURCE": list(inputs), "--exclude": exclude or []}, "the command line")
    if margin is not None and rejected != "margin":
        raise UserError(f"--margin {margin:g} means nothing to --rejected {rejected}.", "Add --rejected margin.")
    report = make_pairs(
        inputs,
        out,
        PairRules(chosen_by, rejected, 1.0 if margin is None else margin, system_prompt, seed),
        split=split,
        exclude=exclude or [],
        test=test,
        file_format=file_format,
        num_proc=num_proc,
        overwrite=overwrite,
    )
    if report is None:
        console.say(f"{out} is complete already.")
    else:
        _say_made(out, report_lines(report), report["files"], "report.md, report.json and dropped.tsv")
    console.say(next_lines(["dpo", f"dataset.path={out}", f"dataset.split={TRAIN}"]))


def _say_made(out: Path, lines: list[str], files: list[str], others: str) -> None:
    say_all(lines)
    console.say(f"wrote {out}: {', '.join(files[:4])}{', …' if len(files) > 4 else ''}, {others}")


def show(
    context: Context,
    config: StageConfig = None,
    row: Annotated[
        int | None, Option(help="The number of a packed row (sft) or a pair (dpo); the first by default.")
    ] = None,
    place: Annotated[
        str | None, Option("--from", help="Instead: one row of the source; 17, or 'train.jsonl row 17'.")
    ] = None,
    held_out: Annotated[bool, Option("--held-out", help="A row of eval_dataset.")] = False,
    table: Annotated[bool, Option("--table", help="One token a line.")] = False,
    everything: Annotated[bool, Option("--all", help="All conversations of a packed row, not the first two.")] = False,
) -> None:
    """A row as training sees it, token by token; needs the base's tokenizer and config.json, no weights."""
    from ..errors import UserError
    from ..monitor.rows import open_rows, segments_from, segments_of_row, stage_of_words, table_lines, view_lines

    if row is not None and place is not None:
        raise UserError("--row and --from: both name a row.", "Leave one out.")
    method, words = stage_of_words(list(context.args), config)
    rows = open_rows(method, config, words, held_out=held_out)
    say_all(f"note: {note}" for note in rows.notes)
    if place is not None:
        number, segments = segments_from(rows, place)
    else:
        number = 1 if row is None else row
        segments = segments_of_row(rows, number)
    if table:
        lines = table_lines(rows, number, segments)
    else:
        most = None if everything or method == "dpo" else 2
        width = console.out.width if console.out.is_terminal else 80
        lines = view_lines(rows, number, segments, width, most)
    for line in lines:
        console.out.print(line)


def stats(
    context: Context,
    config: StageConfig = None,
    places: Annotated[int, Option(min=0, help="Rows to name for each reason to leave out or cut; 0: all.")] = 5,
) -> None:
    """Lengths, cut and left out rows, packing, tokens and steps; needs no weights."""
    from ..monitor.rows import open_rows, stage_of_words
    from .row_stats import print_stats

    method, words = stage_of_words(list(context.args), config)
    opened = open_rows(method, config, words)
    say_all(f"note: {note}" for note in opened.notes)
    for held_out in (False, True) if opened.config.eval_dataset else (False,):
        rows = opened.prepare(True) if held_out else opened
        print_stats(rows, places)
