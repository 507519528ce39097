"""``zephyr-lite distill``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..monitor.console import Console
from .feedback import ENDPOINT, job_kept, say_all, settings_of
from .options import JobConfig, JobDryRun, JobOut, JobSeed, MaxRequests, MaxTokens, Verbose

console = Console()


class From(StrEnum):
    """The source of first questions."""

    grid = "grid"
    seeds = "seeds"


def distill(
    ctx: typer.Context,
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
    from ..recipe.distill import DistillConfig

    settings = settings_of(ctx, DistillConfig, seeds="seeds.path", split="seeds.split", column="seeds.column")
    from ..client.cost import Meter, bound_lines, budget_lines, has_prices
    from ..recipe.distill import TRAIN, distill_bounds, plan_distill, run_distill
    from ..recipe.prompts import read_prompts

    read = None if settings.seeds is None else read_prompts(settings.seeds, seed=settings.seed)
    if read is not None:
        console.say(read.note())
    plan, specs = plan_distill(settings, read), settings.endpoints().values()
    if dry_run:
        say_all(bound_lines(distill_bounds(settings, plan), specs))
        say_all(budget_lines(settings.budget, plan.out))
        return
    with job_kept(plan.out), Meter(console.out, plan.wanted, "dialogues", has_prices(specs)) as meter:
        result = run_distill(settings, plan, meter)
    say_all(result.lines())
    if result.train:
        console.say(f"Next: zephyr-lite sft dataset.path={plan.out / TRAIN}")
