"""The commands: parse, call, print. What is heavy to import is imported when a command runs."""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
import warnings
from contextlib import suppress
from typing import IO, Annotated, Any, NoReturn

import typer
from typer import Option

from .. import __version__
from ..errors import Interrupted, UserError
from ..io.interrupts import alone, just_interrupted, launched, speaks
from ..io.logging import messages_to
from ..ops.hub_kernels import no_hub_kernels
from ..train.distributed import PeerEnded
from . import data, eval, model, recipe
from .examples import add_examples
from .options import console
from .talk import chat, serve, ui
from .train import env, keys, plan, suggest, train

app = typer.Typer(
    name="zephyr-lite",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn a base model into a chat model, the way Zephyr was made: sft, then dpo, then merge.",
)
data_app = typer.Typer(no_args_is_help=True, help="Make data sets, and show them as training sees them.")
eval_app = typer.Typer(no_args_is_help=True, help="Evaluate a model against its base and the stage before.")
export_app = typer.Typer(no_args_is_help=True, help="Export a merged model: GGUF, Ollama, model card, hub.")

_TRAINS = ("sft", "dpo", "demo", "ablate", "reproduce")
# set before anything heavy is imported, unless the user set it
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",  # each of its retries would be a line
    "TOKENIZERS_PARALLELISM": "false",  # a fork after tokenizing would warn
}
_KEYS = (
    "Any key of the configuration may follow, as key=value, --key value or --key=value; `zephyr-lite keys` lists them."
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, Option("--verbose", help="With any command: show the traceback of an error.")] = False,
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


def _keys(words: str) -> dict[str, Any]:
    """Settings of a command after which any key of the configuration may follow.

    Args:
        words: the usage line.
    """
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    return {"context_settings": settings, "epilog": _KEYS, "options_metavar": words}


_SFT = "Stage 1: train the base on conversations. Without arguments: Mistral-7B on UltraChat-200k."
_DPO = "Stage 2: train on preference pairs, on top of stage 1. Without arguments: continue the newest run."
app.command("sft", help=_SFT, **_keys("[OPTIONS] [KEY=VALUE]..."))(train)
app.command("dpo", help=_DPO, **_keys("[OPTIONS] [KEY=VALUE]..."))(train)
app.command(**_keys("[sft|dpo|both] [OPTIONS] [KEY=VALUE]..."))(plan)
app.command(**_keys("[sft|dpo] [OPTIONS] [KEY=VALUE]..."))(suggest)
app.command()(keys)
app.command()(recipe.demo)
app.command()(env)
app.command()(model.merge)
app.command(**_keys("[TABLE] [OPTIONS] [[STAGE.]KEY=VALUE]..."))(recipe.ablate)
app.add_typer(data_app, name="data")
data_app.command(no_args_is_help=True)(data.chat)
data_app.command(no_args_is_help=True)(data.pairs)
data_app.command(**_keys("[sft|dpo] [OPTIONS] [KEY=VALUE]..."))(data.show)
data_app.command(**_keys("[sft|dpo] [OPTIONS] [KEY=VALUE]..."))(data.stats)
app.command(no_args_is_help=True)(recipe.feedback)
app.command(no_args_is_help=True)(recipe.distill)
app.add_typer(eval_app, name="eval")
for evaluation in (eval.loss, eval.preference, eval.mt_bench, eval.alpaca, eval.harness):
    eval_app.command()(evaluation)
app.command()(chat)
app.command()(serve)
app.command()(ui)
app.command()(model.report)
app.command(**_keys("[RECIPE] [OPTIONS] [KEY=VALUE]..."))(recipe.reproduce)
app.command(no_args_is_help=True)(model.check)
app.add_typer(export_app, name="export")
for export in (model.gguf, model.ollama, model.card, model.push):
    export_app.command()(export)
add_examples(app)


def run(arguments: list[str]) -> int:
    """Run a command.

    Returns:
        0: done (or done already); 1: a bug in zephyr-lite; 2: the user has to change something; 130: interrupted; 141: the
        reader of its output has gone (as of a command that SIGPIPE ended).
    """
    verbose = "--verbose" in arguments  # of every command, anywhere
    arguments = [word for word in arguments if word != "--verbose"]
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if sys.stderr is None or not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):  # unreadable in a log file
            os.environ.setdefault(name, "1")
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
            code, message = _ending(error, arguments)
            try:
                if verbose:
                    console.traceback(error)
                if code == 1:
                    console.failure(error)
                elif isinstance(message, UserError):
                    console.user_error(message)
                elif message and speaks():
                    console.complain(message)
            except OSError:  # standard error cannot be written either: only the exit code is left
                _discard(sys.stderr)
            return code


def _ending(error: BaseException, arguments: list[str]) -> tuple[int, str | UserError]:
    """The exit code of an error that ended a command, and what is printed of it."""
    if isinstance(error, Interrupted):
        return 130, error.message
    if isinstance(error, PeerEnded):  # the other process prints its error
        return error.code, error.message if error.code else ""
    if isinstance(error, KeyboardInterrupt | typer.Abort) or just_interrupted():
        return 130, interrupted_line(arguments)
    usage_error: Any = typer.BadParameter.__base__
    if isinstance(error, usage_error):
        shown = io.StringIO()
        error.show(file=shown)
        return 2, shown.getvalue().rstrip("\n").replace("Value error, ", "")
    known = error if isinstance(error, UserError) else machine_error(error, arguments)
    if known is None:
        return 1, ""
    return 2, "" if getattr(known, "said_elsewhere", False) else known


def interrupted_line(arguments: list[str]) -> str:
    if arguments[:1] and arguments[0] in _TRAINS and "--dry-run" not in arguments:
        return "interrupted; the same command resumes from the last checkpoint, if there is one"
    return "interrupted"


def machine_error(error: BaseException | None, arguments: list[str]) -> UserError | None:
    """The user's message for errors of the machine (memory, disk, permissions) among an error and its causes; None: there is
    none."""
    again = (
        "The same command resumes from the last checkpoint, if there is one."
        if arguments[:1] and arguments[0] in _TRAINS
        else ""
    )
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
    """Send what a stream still holds to /dev/null: it cannot be written, and would fail again when Python ends."""
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
