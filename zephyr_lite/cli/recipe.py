"""``zephyr-lite demo``, ``feedback``, ``distill``, ``ablate`` and ``reproduce``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from typer import Context, Option

from ..errors import UserError
from ..io.logging import messages_to
from .options import (
    JobConfig,
    JobDryRun,
    JobOut,
    JobSeed,
    MaxRequests,
    MaxTokens,
    console,
    name_of_words,
    next_lines,
    say_all,
)

if TYPE_CHECKING:
    from ..client.jobs import JobConfig as Configuration

Settings = TypeVar("Settings", bound="Configuration")

ENDPOINT = "URL#MODEL of a server, or a folder (runs/NAME); key=value settings may follow, after commas"


def demo(out: Annotated[Path, Option(help="Output folder of the run and the model.")] = Path("demo")) -> None:
    """The whole recipe in three minutes on a CPU: a small real model, before and after."""
    from ..demo.run import print_result, run_demo
    from ..monitor.report import REPORT
    from ..monitor.screens import open_screen

    with open_screen(console) as screen, messages_to(screen.log):
        result = run_demo(out, observers=[screen])
    print_result(console, result)
    console.say(f"\nreport: {out / REPORT} (open it in a browser)")
    console.say(f"model: {out / 'merged'} (for transformers' AutoModelForCausalLM)")
    console.say(next_lines(["chat", str(out), "--compare"]))


def feedback(
    ctx: Context,
    config: JobConfig = None,
    prompts: Annotated[
        str | None, Option(help="A file (also .txt, one a line), folder or hub id with prompts.")
    ] = None,
    model: Annotated[list[str] | None, Option(help=f"{ENDPOINT}; repeatable.")] = None,
    judge: Annotated[str | None, Option(help="The model that rates; same forms as --model.")] = None,
    out: JobOut = None,
    split: Annotated[str | None, Option(help="Split of the prompts, if there are several.")] = None,
    column: Annotated[str | None, Option(help="The column that holds the prompt.")] = None,
    limit: Annotated[int | None, Option(help="Number of prompts, drawn at random.")] = None,
    completions: Annotated[int | None, Option(help="Completions per prompt [4].")] = None,
    principles: Annotated[
        Literal["auto", "all", "none"] | None,
        Option(
            help="System prompts that ask for one virtue each. auto: where a server's model answers a prompt more "
            "than once; a local folder is sampled as it is."
        ),
    ] = None,
    principles_file: Annotated[Path | None, Option(help="YAML, instead of the built-in system prompts.")] = None,
    overall: Annotated[
        bool | None, Option(help="Also ask for a critique and a score of 1 to 10 per completion.")
    ] = None,
    seed: JobSeed = None,
    max_requests: MaxRequests = None,
    max_tokens: MaxTokens = None,
    pairs: Annotated[bool, Option(help="Make preference pairs too, in OUT/pairs.")] = True,
    dry_run: JobDryRun = False,
) -> None:
    """AI feedback from scratch: several models answer, a judge rates; rows as UltraFeedback's, and pairs for dpo."""
    from ..recipe.feedback import FeedbackConfig

    names = {"prompts": "prompts.path", **{name: f"prompts.{name}" for name in ("split", "column", "limit")}}
    settings = settings_of(ctx, FeedbackConfig, **names)
    from ..recipe.feedback import FeedbackJob, make_pair_folder
    from ..recipe.prompts import read_prompts

    read = read_prompts(settings.prompts, seed=settings.seed)
    console.say(read.note())
    job = FeedbackJob(settings, read)
    if dry_run:
        say_all(job.cost_lines())
        return
    with job_meter(job.out, len(read.prompts), "prompts") as meter:
        job.run(meter)
    console.table(*job.ratings_table())
    say_all(job.lines())
    if pairs:
        say_all(make_pair_folder(settings))


def distill(
    ctx: Context,
    config: JobConfig = None,
    teacher: Annotated[str | None, Option(help=f"The model that answers: {ENDPOINT}.")] = None,
    user: Annotated[str | None, Option(help="The model that writes the user's turns; the teacher by default.")] = None,
    out: JobOut = None,
    count: Annotated[
        int | None, Option(help="Number of dialogues; by default one for each cell of the grid (600).")
    ] = None,
    rounds: Annotated[int | None, Option(help="Maximum rounds of question and answer in a dialogue [3].")] = None,
    grid: Annotated[Path | None, Option(help="YAML with topics and kinds, instead of the built-in.")] = None,
    seeds: Annotated[str | None, Option(help="Prompts shown as examples: a file, folder or hub id.")] = None,
    split: Annotated[str | None, Option(help="Split of the seeds, if there are several.")] = None,
    column: Annotated[str | None, Option(help="The column of the seeds that holds the prompt.")] = None,
    openings: Annotated[
        Literal["grid", "seeds"] | None,
        Option(help="seeds: each seed is the first question of a dialogue, and no grid is used."),
    ] = None,
    similarity: Annotated[
        float | None, Option(help="Reject openings that are this similar to an earlier one [0.7].")
    ] = None,
    tries: Annotated[int | None, Option(help="Maximum attempts at an opening [4].")] = None,
    test_share: Annotated[float | None, Option(help="Share of the dialogues that is held out [0.02].")] = None,
    seed: JobSeed = None,
    max_requests: MaxRequests = None,
    max_tokens: MaxTokens = None,
    dry_run: JobDryRun = False,
) -> None:
    """Dialogues from a teacher: it asks, answers, and refines the question, evenly over topics and kinds of text."""
    from ..recipe.distill import DistillConfig

    settings = settings_of(ctx, DistillConfig, seeds="seeds.path", split="seeds.split", column="seeds.column")
    from ..recipe.distill import TRAIN, DistillJob
    from ..recipe.prompts import read_prompts

    read = None if settings.seeds is None else read_prompts(settings.seeds, seed=settings.seed)
    if read is not None:
        console.say(read.note())
    job = DistillJob(settings, read)
    if dry_run:
        say_all(job.cost_lines())
        return
    with job_meter(job.out, job.wanted, "dialogues") as meter:
        job.run(meter)
    say_all(job.lines())
    if job.made[TRAIN]:
        console.say(next_lines(["sft", f"dataset.path={job.out / TRAIN}"]))


def ablate(
    context: Context,
    out: Annotated[str | None, Option(help="Folder of all stages; the table's by default.")] = None,
    only: Annotated[list[str] | None, Option(help="One arm of the table; repeatable.")] = None,
    chat: Annotated[str | None, Option(help="Folder or id to use for HuggingFaceH4/ultrachat_200k.")] = None,
    preferences: Annotated[
        str | None, Option(help="Folder or id to use for HuggingFaceH4/ultrafeedback_binarized.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print arms, stages and keys; train nothing.")] = False,
) -> None:
    """Compare several ways through the recipe on one base: recipe (the default), alpha-beta, or a file."""
    from ..recipe.ablations import read_table

    name, words = name_of_words(list(context.args), "recipe")
    table = read_table(name, words, out=out, only=only or [], chat=chat, preferences=preferences)
    if dry_run:
        for arm, stages in table.arms.items():
            console.say(f"{arm}: {' → '.join(stage.name for stage in stages)}")
        for stage in table.stages():
            console.heading(f"{stage.name} ({stage.method}, {stage.file})")
            config = stage.loaded.config.model_dump(mode="json", exclude_defaults=True)
            say_all([f"  {note}" for note in stage.loaded.notes])
            say_all([f"  {key}: {value}" for key, value in config.items()])
        return
    from ..monitor.screens import Screen
    from ..recipe.ablations import HEADER, legend, run_ablation, table_rows

    if any(stage.loaded.config.engine == "unsloth" for stage in table.stages()):
        raise UserError("engine unsloth patches the libraries of its process.", "Use engine=fused or engine=trl here.")
    result = run_ablation(table, observers=[Screen(console)])
    console.table(HEADER, table_rows(result))
    say_all(legend(result))


def reproduce(
    context: Context,
    out: Annotated[Path | None, Option(help="The run's folder \\[the recipe's].")] = None,
    judge: Annotated[str | None, Option(help="MT-Bench too, graded by URL#MODEL of a server, or by a folder.")] = None,
    who: Annotated[str, Option(help="Your name in the row.")] = "anonymous",
    dry_run: Annotated[bool, Option("--dry-run", help="Print the commands; start nothing.")] = False,
) -> None:
    """Run a recipe, overnight (the default) or full: both stages, merge, evaluation, report, and its row of results."""
    from ..io.redact import refuse_secrets

    recipe, words = name_of_words(list(context.args), "overnight")
    # they are written into results.json
    refuse_secrets({"--judge": judge or "", "--who": who, "--out": str(out or "")}, "the command line")
    from ..demo.reproduce import command_line, plan_reproduction, run_reproduction

    chosen = plan_reproduction(recipe, words, out=out, judge=judge, who=who)
    if dry_run:
        say_all(command_line(command) for _, command in chosen.commands)
        return
    run_reproduction(chosen)


# -- jobs that ask models ----------------------------------------------------------------------------------------------

NO_KEYS = ("config", "dry_run", "pairs", "annotations")  # options that are no keys of a job's configuration
KEYS = {"model": "models", "max_requests": "budget.requests", "max_tokens": "budget.tokens"}


def settings_of(ctx: Context, kind: type[Settings], **names: str) -> Settings:
    """A job's configuration: the file of --config with the command's options over it.

    Args:
        names: option → key, where they differ (see ``KEYS`` too).
    """
    from ..client.jobs import load_settings

    def plain(value: Any) -> Any:  # as a YAML file would hold it
        if isinstance(value, list | tuple):
            return list(value) or None
        return str(value) if isinstance(value, Path) else value

    keys = {**KEYS, **names}
    options = {keys.get(name, name): plain(value) for name, value in ctx.params.items() if name not in NO_KEYS}
    return load_settings(kind, ctx.params["config"], options)


@contextmanager
def job_meter(folder: Path, total: int, unit: str) -> Iterator[Any]:
    """The meter of a job (``client.jobs.Meter``); after an interrupt, print that no reply is lost."""
    from ..client.jobs import Meter

    try:
        with Meter(console.out, total, unit) as meter:
            yield meter
    except KeyboardInterrupt:
        console.complain(
            f"{folder}: every reply is in the request log; the same command continues the job and sends no answered request again."
        )
        raise
