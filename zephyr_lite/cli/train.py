"""``zephyr-lite sft``, ``dpo``, ``plan``, ``suggest``, ``keys`` and ``env``."""

from __future__ import annotations

import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from ..errors import UserError
from ..io.atomic import make_folder, write_text
from ..io.interrupts import launched
from ..io.logging import RESULT, messages_to
from ..model.allocator import set_allocator
from ..train.distributed import everywhere, joined
from .options import StageConfig, console, next_lines, say_all

if TYPE_CHECKING:
    from ..config.load import Method, RunConfig

logger = logging.getLogger(__name__)


def train(
    context: Context,
    config: StageConfig = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print the plan, the first row and the first step's time; keep nothing.")
    ] = False,
    smoke: Annotated[
        bool, Option("--smoke", help="Smoke test in minutes: 20 steps, a kill, a resume, merge, a generation.")
    ] = False,
    quiet: Annotated[bool, Option("--quiet", help="Print warnings and the result, and nothing of the steps.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print a JSON object a line, for programs.")] = False,
) -> None:
    """Train a stage by the method that the command is named after."""
    from ..config.load import load_config

    method: Any = context.info_name
    if launched() > 1 and (dry_run or smoke):
        raise UserError(
            f"{'--dry-run' if dry_run else '--smoke'} runs in one process; {launched()} were started.",
            "Start it without torchrun.",
        )
    if smoke and (dry_run or quiet or as_json):
        other = "--dry-run" if dry_run else "--quiet" if quiet else "--json"
        raise UserError(f"--smoke and {other} do not go together.", "Take one of them.")
    try:  # a wrong key is reported before torch is imported
        given = load_config(method, config or f"zephyr-7b/{method}", context.args)
    except UserError as error:
        raise everywhere(error, machine=True) from None
    given.announce = True
    if smoke:
        from ..demo.smoke import run_smoke

        run_smoke(method, config, context.args)
        return
    if given.config.engine == "unsloth":
        from ..engines import start_unsloth

        start_unsloth()  # it replaces what is imported from here on
    else:
        set_allocator()
    from ..config.resolve import resolve_run
    from ..monitor.report_writer import ReportWriter
    from ..monitor.screens import open_screen
    from ..train.resume import StageComplete

    run: Any
    if method == "sft":
        from ..train.sft import run_sft as run
    else:
        from ..train.dpo import run_dpo as run

    with joined() as here:
        if not here.is_main_process:
            # libraries' output must not mix with the events of --json
            with redirect_stdout(sys.stderr), messages_to(None):
                run(here.broadcast(lambda: None))
            return
        with open_screen(console, quiet=quiet, as_json=as_json) as screen, messages_to(screen.log):
            try:
                loaded = here.broadcast(
                    lambda: resolve_run(method, config, context.args, loaded=given, fetch=not dry_run)
                )
                if dry_run:
                    from ..train.dry_run import run_dry

                    run_dry(method, loaded, show=None if quiet else console.row)
                    return
                run(loaded, observers=[screen, ReportWriter()])
            except StageComplete as done:
                logger.info(done.message, extra=RESULT)
            logger.info(next_lines(*_next_commands(method, config, loaded.config)), extra=RESULT)


def _next_commands(method: Method, file: str | None, config: RunConfig) -> list[list[str]]:
    """The commands that usually follow a finished stage: stage 2 of the recipe, or the use of the model."""
    from ..config.load import preset_configs
    from ..config.schema import SFT_DATA

    run = config.output_dir
    if method == "sft" and config.dataset[0].path == SFT_DATA:
        following = (file or "").removesuffix("sft") + "dpo"
        preset = ["--config", following] if following in preset_configs() else []
        return [["dpo", *preset, f"output_dir={run}"]]
    evaluates = config.eval_dataset and config.row_kind(method) != "kto"
    evaluation = [["eval", "loss" if method == "sft" else "preference", run]] if evaluates else []
    return [["chat", run, "--compare"], *evaluation, ["merge", "--run", run, "--out", "model/"]]


def plan(
    context: Context,
    config: StageConfig = None,
    gpu: Annotated[str | None, Option(help="A card by name: t4, 3060, 4090, a100-80 …")] = None,
    vram: Annotated[
        str | None, Option(help="Memory of the card, such as 8GiB. Without --gpu: a generic card of that size.")
    ] = None,
    price: Annotated[float | None, Option(min=0, help="US dollars an hour for the card.")] = None,
    details: Annotated[bool, Option("--details", help="Memory by name, what was chosen, and disk.")] = False,
    ladder: Annotated[bool, Option("--ladder", help="A Markdown table of cards from 6 to 24 GB.")] = False,
) -> None:
    """Memory, time and disk that a run takes, on this machine or on any card; needs neither weights nor a GPU."""
    from ..config.resolve import resolve_run
    from ..memory.forecast import ladder_lines, planned_lines, stages_of
    from ..train.small_data import settle_before

    methods, words = stages_of(list(context.args), config)
    if len(methods) > 1 and any(word.lstrip("-").startswith("dataset") for word in words):
        raise UserError("a data set is for one stage.", "Name it: `zephyr-lite plan sft …` or `plan dpo …`.")
    if ladder:
        if words != context.args or config or gpu or vram or price is not None or details:
            raise UserError(
                "plan --ladder takes only key=value.", "Its cards and stages are its own; leave the others out."
            )
        console.plan(ladder_lines(words))
        return
    for method in methods:
        loaded = resolve_run(method, config, words, runs_root=None)
        rows = settle_before(method, loaded)
        console.plan(planned_lines(method, loaded, rows=rows, gpu=gpu, vram=vram, price=price, details=details))
    if not details:
        console.plan(["details: add --details"])


def suggest(
    context: Context,
    config: StageConfig = None,
    probe: Annotated[bool, Option("--probe", help="Also train 20 steps at each of five learning rates.")] = False,
    out: Annotated[Path | None, Option("--out", "-o", help="Write it as a YAML file.")] = None,
    gpu: Annotated[str | None, Option(help="A card by name: t4, 3060, 4090, a100-80 …")] = None,
) -> None:
    """Rank, learning rate, epochs and batch size for your rows, each with its reason; and the plan for the card."""
    from ..config.load import dump_config
    from ..config.resolve import resolve_run
    from ..memory.forecast import planned_lines
    from ..monitor.rows import stage_of_words
    from ..train import suggest as suggestions

    method, words = stage_of_words(list(context.args), config)
    if out is not None:
        make_folder(out.parent)  # before anything is computed
    loaded = resolve_run(method, config, words)
    before = loaded.config
    table, rows = suggestions.suggest(method, loaded, loaded.given if config else loaded.typed)
    console.plan(suggestions.table_lines(table))
    if probe:
        console.plan(suggestions.probe(method, loaded))
    else:
        console.plan(planned_lines(method, loaded, rows=rows, gpu=gpu))
    if out is None:
        file = ["--config", config] if config else []
        console.say(next_lines([method, *file, *words, *suggestions.changed_words(loaded.config, before)]))
    else:
        write_text(out, dump_config(loaded.config))
        console.say(next_lines([method, "--config", str(out)]))


def keys(
    word: Annotated[
        str | None, Argument(metavar="WORD", help="Only keys with this word in their name or description.")
    ] = None,
) -> None:
    """Every key of the configuration: values, default and meaning; with WORD also other tools' keys."""
    from ..config.keys import keys_as_lines

    say_all(keys_as_lines(word, min(80, console.out.width)))


def env() -> None:
    """Show hardware and libraries, what is missing, and how to install it."""
    from .environment import survey

    for finding in survey():
        console.say(finding.line(min(80, console.out.width)))
