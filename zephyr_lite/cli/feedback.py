"""``zephyr-lite feedback``, and what all commands that ask models print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..monitor.console import Console
from .options import JobConfig, JobDryRun, JobOut, JobSeed, MaxRequests, MaxTokens, Verbose

if TYPE_CHECKING:
    from ..client.jobs import JobConfig as Configuration

Settings = TypeVar("Settings", bound="Configuration")
console = Console()

ENDPOINT = "URL#MODEL of a server, or a folder (runs/NAME); key=value settings may follow, after commas"


class Principles(StrEnum):
    """Which completions get a system prompt that asks for one virtue."""

    auto = "auto"
    all = "all"
    none = "none"


def feedback(
    ctx: typer.Context,
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
    from ..recipe.feedback import FeedbackConfig

    names = {"prompts": "prompts.path", **{name: f"prompts.{name}" for name in ("split", "column", "limit")}}
    settings = settings_of(ctx, FeedbackConfig, **names)
    from ..client.cost import Meter, bound_lines, budget_lines, has_prices
    from ..recipe.feedback import feedback_bounds, make_pair_folder, read_principles, run_feedback
    from ..recipe.prompts import read_prompts

    read = read_prompts(settings.prompts, seed=settings.seed)
    console.say(read.note())
    out_folder, specs = Path(settings.out), settings.endpoints().values()
    if dry_run:
        texts = read_principles(Path(settings.principles_file) if settings.principles_file else None)
        say_all(bound_lines(feedback_bounds(settings, read.prompts, texts), specs))
        say_all(budget_lines(settings.budget, out_folder))
        return
    with job_kept(out_folder), Meter(console.out, len(read.prompts), "prompts", has_prices(specs)) as meter:
        result = run_feedback(settings, read, meter)
    console.table(*result.ratings_table())
    say_all(result.lines())
    if pairs:
        say_all(make_pair_folder(settings))


NO_KEYS = ("config", "dry_run", "verbose", "pairs", "annotations")  # options that are no keys of a job's configuration
KEYS = {"model": "models", "max_requests": "budget.requests", "max_tokens": "budget.tokens"}


def settings_of(ctx: typer.Context, kind: type[Settings], **names: str) -> Settings:
    """A job's configuration: the file of --config with the command's options over it.

    Args:
        names: option → key, where they differ (see ``KEYS`` too).
    """
    from ..client.jobs import load_settings

    keys = {**KEYS, **names}
    options = {keys.get(name, name): _plain(value) for name, value in ctx.params.items() if name not in NO_KEYS}
    return load_settings(kind, ctx.params["config"], options)


def _plain(value: Any) -> Any:
    """An option's value as a YAML file would hold it; None: not given."""
    if isinstance(value, list | tuple):
        return list(value) or None
    return value.value if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value


def say_all(lines: list[str]) -> None:
    for line in lines:
        console.say(line)


@contextmanager
def job_kept(folder: Path) -> Iterator[None]:
    """At an interrupt, say that no reply is lost."""
    try:
        yield
    except KeyboardInterrupt:
        console.complain(
            f"{folder}: every reply is in the request log; the same command continues the job and sends no answered request again."
        )
        raise
