"""The commands: parse, call, print. What is heavy to import is imported when a command runs."""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO, Annotated, Any, NoReturn

import typer

from .. import __version__
from ..errors import Interrupted, UserError
from ..io.interrupts import alone, just_interrupted, launched, speaks
from ..io.logging import messages_to
from ..monitor.console import Console
from ..ops.hub_kernels import no_hub_kernels
from ..train.distributed import PeerEnded
from .ablate import ablate
from .check import check
from .data_chat import chat as data_chat
from .data_pairs import pairs
from .data_rows import show, stats
from .distill import distill
from .eval_harness import harness
from .eval_judged import alpaca, mt_bench
from .eval_rows import loss, preference
from .examples import add_examples
from .export import card, gguf, ollama, push
from .feedback import feedback
from .merge import merge
from .options import StageConfig, Verbose, nameable
from .report import report
from .reproduce import reproduce
from .talk import chat
from .train import train

app = typer.Typer(
    name="zephyr-lite",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn a base model into a chat model, the way Zephyr was made: sft, then dpo, then merge.",
)
console = Console()
data_app = typer.Typer(no_args_is_help=True, help="Make data sets, and look at them as training does.")

eval_app = typer.Typer(no_args_is_help=True, help="Is it better than the base, and than the stage before?")
export_app = typer.Typer(no_args_is_help=True, help="Take a merged model elsewhere.")

_TRAINS = ("sft", "dpo", "demo", "ablate", "reproduce")
# set before anything heavy is imported, unless the user set it
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",  # each of its retries would be a line
    "TOKENIZERS_PARALLELISM": "false",  # a fork after tokenizing would warn
}
# any key of the configuration may follow a training command
OPEN: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
KEYS = "Any key of the configuration may follow, as key=value, --key value or --key=value; docs/configuration.md lists them."


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Verbose = False,
) -> None:
    if version:
        console.say(f"zephyr-lite {__version__}")
        raise typer.Exit()
    if launched() > 1 and context.invoked_subcommand not in ("sft", "dpo", None):
        raise UserError(
            f"{context.invoked_subcommand} runs in one process; {launched()} were started.",
            "Only sft and dpo are spread over several: start this one without torchrun.",
        )
    alone()


_TRAIN: dict[str, Any] = {"context_settings": OPEN, "epilog": KEYS, "options_metavar": "[OPTIONS] [KEY=VALUE]..."}
_SFT = "Stage 1: train the base on conversations. Without arguments: Mistral-7B on UltraChat-200k."
_DPO = "Stage 2: train on preference pairs, on top of stage 1. Without arguments: continue the newest run."
app.command("sft", help=_SFT, **_TRAIN)(train)
app.command("dpo", help=_DPO, **_TRAIN)(train)


@app.command(context_settings=OPEN, epilog=KEYS, options_metavar="[sft|dpo|both] [OPTIONS] [KEY=VALUE]...")
def plan(
    context: typer.Context,
    config: StageConfig = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="A card by name: t4, 3060, 4090, a100-80 …")] = None,
    vram: Annotated[
        str | None, typer.Option("--vram", help="So much memory: 8GiB. Alone: a plain card of that size.")
    ] = None,
    price: Annotated[float | None, typer.Option("--price", help="US dollars an hour for the card.")] = None,
    ladder: Annotated[bool, typer.Option("--ladder", help="A Markdown table of cards from 6 to 24 GB.")] = False,
    verbose: Verbose = False,
) -> None:
    """What a run will take and how fast it will be, on this machine or on any card; needs neither weights nor a GPU."""
    from ..config.resolve import resolve_run
    from ..memory.forecast import ladder_lines, planned_lines, stages_of

    methods, words = stages_of(list(context.args), config)
    if ladder:
        stage = None if words == context.args else context.args[0]
        others = {"--gpu": gpu, "--vram": vram, "--price": price, "--config": config, f"a stage ({stage})": stage}
        console.plan(ladder_lines(words, others))
        return
    for method in methods:
        console.plan(planned_lines(method, resolve_run(method, config, words), gpu=gpu, vram=vram, price=price))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", callback=nameable, help="Where the demo's run and model go.")] = Path(
        "runs/demo"
    ),
    verbose: Verbose = False,
) -> None:
    """The whole recipe in three minutes on a CPU: a small real model, before and after."""
    from ..demo.run import print_standings, run_demo

    result = run_demo(out, on_metrics=console.metrics)
    print_standings(console, result.standings)
    console.say(f"accuracy of the DPO model's implicit reward on held-out pairs: {result.reward_accuracy:.2f}")
    console.say("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in result.seconds.items()))
    console.say(f"The model is in {out / 'merged'}; it loads with transformers' AutoModelForCausalLM.")


@app.command()
def env(verbose: Verbose = False) -> None:
    """What this machine has, what is missing, and how to get it."""
    from .environment import survey

    for finding in survey():
        console.say(finding.line())


app.command()(merge)
app.command(context_settings=OPEN, epilog=KEYS, options_metavar="[TABLE] [OPTIONS] [[STAGE.]KEY=VALUE]...")(ablate)
app.add_typer(data_app, name="data")
data_app.command(no_args_is_help=True)(data_chat)
data_app.command(no_args_is_help=True)(pairs)
data_app.command(context_settings=OPEN, epilog=KEYS, options_metavar="[sft|dpo] [OPTIONS] [KEY=VALUE]...")(show)
data_app.command(context_settings=OPEN, epilog=KEYS, options_metavar="[sft|dpo] [OPTIONS] [KEY=VALUE]...")(stats)
app.command(no_args_is_help=True)(feedback)
app.command(no_args_is_help=True)(distill)
app.add_typer(eval_app, name="eval")
for evaluation in (loss, preference, mt_bench, alpaca, harness):
    eval_app.command()(evaluation)
app.command()(chat)
app.command()(report)
app.command(context_settings=OPEN, epilog=KEYS, options_metavar="[RECIPE] [OPTIONS] [KEY=VALUE]...")(reproduce)
app.command(no_args_is_help=True)(check)
app.add_typer(export_app, name="export")
for way in (gguf, ollama, card, push):
    export_app.command()(way)
add_examples(app)


def run(arguments: list[str]) -> int:
    """Run a command.

    Returns:
        0: done (or done already); 1: a bug in zephyr-lite; 2: the user has to change something; 130: interrupted; 141: the
        reader of its output has gone (as of a command that SIGPIPE ended).
    """
    verbose = "--verbose" in arguments
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings(), no_hub_kernels(), messages_to(console.log):
        if not verbose and not sys.warnoptions:
            warnings.simplefilter("ignore")  # libraries' warnings are for developers
        try:
            code = app(args=arguments, prog_name="zephyr-lite", standalone_mode=False)
            if code == 130:  # typer catches the interrupt itself
                raise KeyboardInterrupt
            return code if isinstance(code, int) else 0
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            # typer prints help by a console of its own, which exits when the pipe is closed
            if isinstance(error.__context__ if isinstance(error, SystemExit) else error, BrokenPipeError):
                _discard(sys.stdout)
                return 128 + signal.SIGPIPE
            if isinstance(error, SystemExit):
                raise
            try:
                return _report(error, arguments, verbose)
            except OSError:  # standard error cannot be written either: only the exit code is left
                _discard(sys.stderr)
                return 130 if isinstance(error, KeyboardInterrupt | Interrupted) else 2


def _report(error: BaseException, arguments: list[str], verbose: bool) -> int:
    """Print what ended a command, and give its exit code."""
    if verbose:
        console.traceback(error)
    usage_error: Any = typer.BadParameter.__base__
    if isinstance(error, Interrupted):
        if speaks():
            console.complain(error.message)
        return 130
    if isinstance(error, PeerEnded):  # the other process prints its error
        if speaks() and error.code:
            console.complain(error.message)
        return error.code
    if isinstance(error, KeyboardInterrupt | typer.Abort) or just_interrupted():
        if speaks():
            console.complain(interrupted_line(arguments))
        return 130
    if isinstance(error, usage_error):
        shown = io.StringIO()
        error.show(file=shown)
        console.complain(shown.getvalue().rstrip("\n").replace("Value error, ", ""))
        return 2
    known = error if isinstance(error, UserError) else machine_error(error, arguments)
    if known is None:
        console.failure(error)
        return 1
    if not getattr(known, "said_elsewhere", False):
        console.user_error(known)
    return 2


def interrupted_line(arguments: list[str]) -> str:
    """What holds for every command that was interrupted anywhere."""
    if "--dry-run" not in arguments and "--help" not in arguments:
        if arguments[:1] and arguments[0] in _TRAINS:
            return "interrupted; the same command resumes: from the last checkpoint, finished stages are not run again"
        if arguments[:1] == ["merge"] or arguments[:2] in (["data", "chat"], ["data", "pairs"]):
            return "interrupted; nothing was left half-written: start the same command again"
    return "interrupted"


def machine_error(error: BaseException | None, arguments: list[str]) -> UserError | None:
    """The user's message for errors of the machine (memory, disk, permissions) among an error and its causes; None: there is
    none."""
    again = "The same command resumes from the last checkpoint." if arguments[:1] and arguments[0] in _TRAINS else ""
    while error is not None:
        text = " ".join(str(error).split())[:300]
        if type(error).__name__ == "OutOfMemoryError":
            return UserError(
                f"the GPU's memory is full: {text[:200]}",
                "Close what else runs on it, lower max_length, or set memory.vram to less than it has.",
            )
        if isinstance(error, MemoryError):
            return UserError(f"main memory is full: {text or 'MemoryError'}", again)
        if isinstance(error, OSError) and error.strerror:
            return UserError(f"{error.strerror}{'' if error.filename is None else f': {error.filename}'}", again)
        if "(os error " in text:  # libraries in Rust (safetensors, tokenizers) wrap the system's error into a text
            return UserError(text, again)
        error = error.__cause__
    return None


def _discard(stream: IO[str] | None) -> None:
    """Send what a stream still holds nowhere: it cannot be written, and would fail again when Python ends."""
    with suppress(OSError, ValueError, AttributeError):  # closed already, or no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


def leave(code: int) -> NoReturn:
    """Flush the output and end the process. From here on a signal ends it at once, instead of waiting for a thread."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(code))
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError as error:
            _discard(stream)
            code = code or (128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else 2)
    if code == 130:  # Python may remember an interrupt that was caught, and end by SIGINT instead of with this code
        atexit._run_exitfuncs()
        os._exit(130)
    sys.exit(code)
