"""The commands: parse, call, print. What is heavy to import is imported when a command runs."""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
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
from .examples import EXAMPLES
from .options import console
from .talk import chat, serve, ui
from .train import env, keys, plan, suggest, train

_TRAINS = ("sft", "dpo", "demo", "ablate", "reproduce")
# set before anything heavy is imported, unless the user set it
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",  # each of its retries would be a line
    "TOKENIZERS_PARALLELISM": "false",  # a fork after tokenizing would warn
}


def _epilog(name: str, keys: bool = False) -> str:
    """The end of a command's help, a paragraph a line: typer may join the lines of a paragraph."""
    examples = EXAMPLES[name]
    lines = ["--verbose adds the traceback of an error."]
    if keys:
        lines.append(
            "Any key of the configuration may follow, as key=value, --key value or --key=value; "
            "`zephyr-lite keys` lists them."
        )
    lines += ["Example:" if len(examples) == 1 else "Examples:", *(f"zephyr-lite {line}" for line in examples)]
    return "\n\n".join(lines)


app = typer.Typer(
    name="zephyr-lite",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn a base model into a chat model, the way Zephyr was made: sft, then dpo, then merge.",
    epilog=_epilog(""),
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


_groups = {"": app}
for _name, _help in {
    "data": "Make data sets, and show them as training sees them.",
    "eval": "Evaluate a model against its base and the stage before.",
    "export": "Export a merged model: GGUF, Ollama, model card, hub.",
}.items():
    _groups[_name] = typer.Typer(no_args_is_help=True, help=_help, epilog=_epilog(_name))
    app.add_typer(_groups[_name], name=_name)


def _add(name: str, command: Callable[..., None], usage: str | None = None, **settings: Any) -> None:
    """Add a command, such as ``data chat``.

    Args:
        usage: its usage line, if any key of the configuration may follow.
    """
    group, _, own = name.rpartition(" ")
    if usage is not None:
        context = {"allow_extra_args": True, "ignore_unknown_options": True}
        settings |= {"context_settings": context, "options_metavar": usage}
    _groups[group].command(own, epilog=_epilog(name, keys=usage is not None), **settings)(command)


_SFT = "Stage 1: train the base on conversations. Without arguments: Mistral-7B on UltraChat-200k."
_DPO = "Stage 2: train on preference pairs, on top of stage 1. Without arguments: continue the newest run."
_add("sft", train, "[OPTIONS] [KEY=VALUE]...", help=_SFT)
_add("dpo", train, "[OPTIONS] [KEY=VALUE]...", help=_DPO)
_add("plan", plan, "[sft|dpo|both] [OPTIONS] [KEY=VALUE]...")
_add("suggest", suggest, "[sft|dpo] [OPTIONS] [KEY=VALUE]...")
_add("keys", keys)
_add("demo", recipe.demo)
_add("env", env)
_add("merge", model.merge)
_add("ablate", recipe.ablate, "[TABLE] [OPTIONS] [[STAGE.]KEY=VALUE]...")
_add("data chat", data.chat, no_args_is_help=True)
_add("data pairs", data.pairs, no_args_is_help=True)
_add("data show", data.show, "[sft|dpo] [OPTIONS] [KEY=VALUE]...")
_add("data stats", data.stats, "[sft|dpo] [OPTIONS] [KEY=VALUE]...")
_add("feedback", recipe.feedback, no_args_is_help=True)
_add("distill", recipe.distill, no_args_is_help=True)
_add("eval loss", eval.loss)
_add("eval preference", eval.preference)
_add("eval mt-bench", eval.mt_bench)
_add("eval alpaca", eval.alpaca)
_add("eval harness", eval.harness)
_add("chat", chat)
_add("serve", serve)
_add("ui", ui)
_add("report", model.report)
_add("reproduce", recipe.reproduce, "[RECIPE] [OPTIONS] [KEY=VALUE]...")
_add("check", model.check, no_args_is_help=True)
_add("export gguf", model.gguf)
_add("export ollama", model.ollama)
_add("export card", model.card)
_add("export push", model.push)


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
    if not sys.stderr.isatty():
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
            code, message = _ending(error, resumes=bool(arguments) and arguments[0] in _TRAINS)
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


def _ending(error: BaseException, resumes: bool) -> tuple[int, str | UserError]:
    """The exit code of an error that ended a command, and what is printed of it.

    Args:
        resumes: the command trains, and continues from a checkpoint.
    """
    again = "the same command resumes from the last checkpoint, if there is one" if resumes else ""
    if isinstance(error, Interrupted):
        return 130, error.message
    if isinstance(error, PeerEnded):  # the other process prints its error
        return error.code, error.message if error.code else ""
    if isinstance(error, KeyboardInterrupt | typer.Abort) or just_interrupted():
        return 130, f"interrupted; {again}" if again else "interrupted"
    usage_error: Any = typer.BadParameter.__base__
    if isinstance(error, usage_error):
        shown = io.StringIO()
        error.show(file=shown)
        return 2, shown.getvalue().rstrip("\n").replace("Value error, ", "")
    known = error if isinstance(error, UserError) else _machine_error(error, again and f"{again.capitalize()}.")
    if known is None:
        return 1, ""
    return 2, "" if getattr(known, "said_elsewhere", False) else known


def _machine_error(error: BaseException | None, hint: str) -> UserError | None:
    """The user's message for an error of memory, disk or permissions among an error and its causes, if there is one."""
    while error is not None:
        text = " ".join(str(error).split())[:300]
        if type(error).__name__ == "OutOfMemoryError":
            hint = "Close what else runs on it, lower max_length, or set memory.vram to less than it has."
            return UserError(f"the GPU's memory is full: {text}", hint)
        if isinstance(error, MemoryError):
            return UserError(f"main memory is full: {text or 'MemoryError'}", hint)
        if isinstance(error, OSError) and error.strerror:
            return UserError(f"{error.strerror}{'' if error.filename is None else f': {error.filename}'}", hint)
        if "(os error " in text:  # libraries in Rust (safetensors, tokenizers) wrap the system's error into a text
            return UserError(text, hint)
        error = error.__cause__
    return None


def _discard(stream: IO[str]) -> None:
    """Send what a stream still holds to /dev/null: it cannot be written, and would fail again when Python ends."""
    with suppress(OSError, ValueError):  # closed already, or no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave(code: int) -> NoReturn:
    """Flush the output and end the process. From here on a signal ends it at once, instead of waiting for a thread."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(code))
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            _discard(stream)
            code = code or (128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else 2)
    if code == 130:  # Python may remember an interrupt that was caught, and end by SIGINT instead of with this code
        atexit._run_exitfuncs()
        os._exit(130)
    sys.exit(code)
