"""``zephyr-lite feedback``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .console import Console
from .options import JobConfig, JobDryRun, JobOut, JobSeed, MaxRequests, MaxTokens, Verbose

console = Console()

ENDPOINT = "URL#MODEL of a server, or a folder (runs/NAME); key=value settings may follow, after commas"


class Principles(StrEnum):
    """Which completions are made under a system prompt that asks for one virtue."""

    auto = "auto"
    all = "all"
    none = "none"


def feedback(
    config: JobConfig = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="A file (also .txt, one a line), folder or hub id with prompts.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option("--model", help=f"{ENDPOINT}. Again for the next.")] = None,
    judge: Annotated[str | None, typer.Option("--judge", help="Who rates; the same forms.")] = None,
    out: JobOut = None,
    split: Annotated[str | None, typer.Option("--split", help="Of the prompts, where there are several.")] = None,
    column: Annotated[str | None, typer.Option("--column", help="The column that holds the prompt.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="So many of the prompts, by a seeded draw.")] = None,
    completions: Annotated[int | None, typer.Option("--completions", help="For each prompt [4].")] = None,
    principles: Annotated[
        Principles | None,
        typer.Option(
            "--principles",
            help="System prompts that ask for one virtue each. auto: where a server's model answers a prompt more "
            "than once; a local folder is sampled as it is.",
        ),
    ] = None,
    principles_file: Annotated[
        Path | None, typer.Option("--principles-file", help="YAML, instead of the built-in system prompts.")
    ] = None,
    overall: Annotated[
        bool | None,
        typer.Option("--overall/--no-overall", help="A critique and a score of 1 to 10 for each completion, too."),
    ] = None,
    seed: JobSeed = None,
    max_requests: MaxRequests = None,
    max_tokens: MaxTokens = None,
    pairs: Annotated[bool, typer.Option("--pairs/--no-pairs", help="Make preference pairs too, in OUT/pairs.")] = True,
    dry_run: JobDryRun = False,
    verbose: Verbose = False,
) -> None:
    """AI feedback from scratch: several models answer, a judge rates; rows as UltraFeedback's, and pairs for dpo."""
    from ..recipe.feedback.specs import FeedbackConfig, load_settings

    settings = load_settings(
        FeedbackConfig,
        config,
        {
            "prompts.path": prompts,
            "prompts.split": split,
            "prompts.column": column,
            "prompts.limit": limit,
            "models": model or None,
            "judge": judge,
            "out": None if out is None else str(out),
            "completions": completions,
            "principles": None if principles is None else principles.value,
            "principles_file": None if principles_file is None else str(principles_file),
            "overall": overall,
            "seed": seed,
            "budget.requests": max_requests,
            "budget.tokens": max_tokens,
        },
    )
    from ..recipe.feedback.estimate import bound_lines, feedback_bounds, priced
    from ..recipe.feedback.meter import Meter
    from ..recipe.feedback.prompts import read_prompts

    read = read_prompts(settings.prompts, seed=settings.seed)
    console.say(read.note())
    costs = priced(settings.endpoints().values())
    if dry_run:
        from ..recipe.feedback.draw import read_principles

        texts = read_principles(Path(settings.principles_file) if settings.principles_file else None)
        for line in bound_lines(feedback_bounds(settings, read.prompts, texts), costs):
            console.say(line)
        say_budget(settings.budget.requests, settings.budget.tokens, Path(settings.out))
        return
    from ..recipe.feedback.report import ratings_table
    from ..recipe.feedback.run import make_pair_folder, run_feedback

    try:
        with Meter(console.out, len(read.prompts), "prompts", costs) as meter:
            result = run_feedback(settings, read, meter, say=console.say)
    except KeyboardInterrupt:
        console.complain(
            f"{settings.out}: every answer is in the journal; the same command goes on, and asks none twice."
        )
        raise
    console.table(*ratings_table(result.tally))
    for line in result.lines():
        console.say(line)
    if pairs:
        for line in make_pair_folder(settings, say=console.say):
            console.say(line)


def say_budget(requests: int | None, tokens: int | None, out: Path) -> None:
    """What limits a job, and what of it is paid for already."""
    limits = [f"{value:,} {unit}" for value, unit in ((requests, "requests"), (tokens, "tokens")) if value is not None]
    console.say(
        f"budget: {' and '.join(limits)}, never exceeded" if limits else "no budget (--max-requests, --max-tokens)"
    )
    if (out / "journal.jsonl").is_file():
        console.say(f"what {out / 'journal.jsonl'} holds is not asked again; it is not taken off here")
