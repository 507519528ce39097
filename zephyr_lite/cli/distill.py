"""``zephyr-lite distill``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .console import Console
from .feedback import ENDPOINT, say_budget
from .options import JobConfig, JobDryRun, JobOut, JobSeed, MaxRequests, MaxTokens, Verbose

console = Console()


class From(StrEnum):
    """Where first questions come from."""

    grid = "grid"
    seeds = "seeds"


def distill(
    config: JobConfig = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help=f"Who answers: {ENDPOINT}.")] = None,
    user: Annotated[
        str | None, typer.Option("--user", help="Who writes the user's turns; the teacher by default.")
    ] = None,
    out: JobOut = None,
    count: Annotated[
        int | None, typer.Option("--count", help="Dialogues; by default one for each cell of the grid (600).")
    ] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Questions and answers in one, at most [3].")] = None,
    grid: Annotated[
        Path | None, typer.Option("--grid", help="YAML with topics and kinds, instead of the built-in.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Prompts shown as examples: a file, folder or hub id.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Of the seeds, where there are several.")] = None,
    column: Annotated[
        str | None, typer.Option("--column", help="The column of the seeds that holds the prompt.")
    ] = None,
    openings: Annotated[
        From | None,
        typer.Option("--openings", help="seeds: each seed is the first question of a dialogue, and no grid is used."),
    ] = None,
    similarity: Annotated[
        float | None, typer.Option("--similarity", help="Openings this near to an earlier one are refused [0.7].")
    ] = None,
    tries: Annotated[int | None, typer.Option("--tries", help="Openings asked for one dialogue, at most [4].")] = None,
    test_share: Annotated[float | None, typer.Option("--test-share", help="Of the dialogues, held out [0.02].")] = None,
    seed: JobSeed = None,
    max_requests: MaxRequests = None,
    max_tokens: MaxTokens = None,
    dry_run: JobDryRun = False,
    verbose: Verbose = False,
) -> None:
    """Dialogues from a teacher: it asks, answers, and refines the question, evenly over topics and kinds of text."""
    from ..recipe.feedback.specs import DistillConfig, load_settings

    settings = load_settings(
        DistillConfig,
        config,
        {
            "teacher": teacher,
            "user": user,
            "out": None if out is None else str(out),
            "count": count,
            "rounds": rounds,
            "grid": None if grid is None else str(grid),
            "seeds.path": seeds,
            "seeds.split": split,
            "seeds.column": column,
            "openings": None if openings is None else openings.value,
            "similarity": similarity,
            "tries": tries,
            "test_share": test_share,
            "seed": seed,
            "budget.requests": max_requests,
            "budget.tokens": max_tokens,
        },
    )
    from ..recipe.feedback.distill import TRAIN, plan_distill, run_distill
    from ..recipe.feedback.estimate import bound_lines, distill_bounds, priced
    from ..recipe.feedback.meter import Meter
    from ..recipe.feedback.prompts import read_prompts

    read = None if settings.seeds is None else read_prompts(settings.seeds, seed=settings.seed)
    if read is not None:
        console.say(read.note())
    plan = plan_distill(settings, read)
    costs = priced(settings.endpoints().values())
    if dry_run:
        for line in bound_lines(distill_bounds(settings, plan), costs):
            console.say(line)
        say_budget(settings.budget.requests, settings.budget.tokens, plan.out)
        return
    try:
        with Meter(console.out, plan.wanted, "dialogues", costs) as meter:
            result = run_distill(settings, plan, meter, say=console.say)
    except KeyboardInterrupt:
        console.complain(f"{plan.out}: every answer is in the journal; the same command goes on, and asks none twice.")
        raise
    for line in result.lines():
        console.say(line)
    if result.train:
        console.say(f"Next: zephyr-lite sft dataset.path={plan.out / TRAIN}")
