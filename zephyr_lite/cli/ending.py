"""How a command ends when it does not end well: signals, what is said of an interruption, faults that are the machine's."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO

from ..errors import UserError
from ..train.distributed import echoes

_TRAINS = ("sft", "dpo", "demo", "ablate", "reproduce")
_ON_DISK = {
    errno.ENOSPC: ("the disk is full", "Free some space{again}."),
    errno.EDQUOT: ("your quota on this disk is used up", "Delete something, or ask for more{again}."),
    errno.EIO: (
        "the disk cannot be read or written",
        "Look at the system's log (dmesg): the disk or its connection may be failing. Copy what matters elsewhere first.",
    ),
    errno.EROFS: (
        "the disk can only be read",
        "Choose a folder on another disk, or mount this one for writing{again}.",
    ),
    errno.EFBIG: ("the file is larger than this file system allows", "Choose a folder on another disk."),
    errno.EACCES: ("access is not allowed", "Change its owner or its mode, or choose another folder."),
    errno.EPERM: ("the system does not permit it", "Change its owner or its mode, or choose another folder."),
    errno.ENAMETOOLONG: ("a name is longer than this file system allows", "Choose a shorter one."),
    errno.ELOOP: ("symbolic links lead in a circle", "Mend the links."),
    errno.ESTALE: ("the network's disk has changed or is gone", "Mount it again{again}."),
    errno.EMFILE: ("this process has too many files open", "Raise the limit, `ulimit -n 8192`{again}."),
    errno.ENFILE: ("the machine has too many files open", "Close what else runs on it{again}."),
}
# safetensors, tokenizers and the hub's downloader are written in Rust, and wrap the system's error into a text
_RUST = re.compile(r"\(os error (\d+)\)")


# when a signal last raised KeyboardInterrupt here, on the clock of time.monotonic
_interrupted_at: float | None = None
# libraries that swallow the interrupt, half-way through their imports above all, fail of something else soon after
_AFTERMATH = 60.0


def take_signals() -> None:
    """From here on Ctrl-C is remembered (``just_interrupted``), and SIGTERM does in this process what Ctrl-C does at that
    moment, each time it comes.

    The training loop and asyncio put handlers of their own in its place, which end in good order; for asyncio it has to
    be Python's own (``pythons_ctrl_c``). Forked workers are ended by SIGTERM as by default, without a traceback. What
    whoever started the process wants ignored stays ignored.
    """
    own = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        at_ctrl_c = signal.getsignal(signal.SIGINT)
        if callable(at_ctrl_c):
            at_ctrl_c(number, frame)
        else:
            _interrupt(number, frame)

    def in_child() -> None:
        # a handler written in Python runs when the interpreter gets around to it: never, where the signal came just before
        # the worker began to wait for a lock of its pool's, and whoever joins it waits too
        if signal.getsignal(signal.SIGTERM) is handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, handle)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=in_child)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted_at
    if echoes(_interrupted_at):
        return
    _interrupted_at = time.monotonic()
    raise KeyboardInterrupt


def just_interrupted() -> bool:
    """Whether a signal came within the last minute that raised KeyboardInterrupt: what fails now most likely fails of it."""
    return _interrupted_at is not None and time.monotonic() - _interrupted_at < _AFTERMATH


@contextmanager
def pythons_ctrl_c() -> Iterator[None]:
    """Within, Ctrl-C is Python's: ``asyncio.run`` cancels its main task only where it finds that handler."""
    ours = signal.getsignal(signal.SIGINT) is _interrupt
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, _interrupt)


def end_at_a_signal(code: int) -> None:
    """All is said and done: from here on a signal ends the process at once, with this exit code, whatever thread or connection
    Python would wait for."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(code))


def interrupted_line(arguments: Sequence[str]) -> str:
    """What is true of each command that was interrupted anywhere."""
    command = " ".join(word for word in arguments[:2] if not word.startswith("-") and "=" not in word)
    if "--dry-run" in arguments or "--help" in arguments:
        return "interrupted"
    if command.startswith(("demo", "ablate", "reproduce")):
        return "interrupted; the same command goes on: a finished stage is not run again, the others from their last checkpoint"
    if command.startswith(("sft", "dpo")):
        return "interrupted; the same command goes on from the last checkpoint, or from the start where there is none"
    if command.startswith("merge"):
        return "interrupted; a merged folder appears only when it is whole: start the same command again"
    if command.startswith(("data chat", "data pairs")):
        return "interrupted; a data set appears only when it is whole: start the same command again"
    return "interrupted"


def machines_fault(error: BaseException, arguments: Sequence[str]) -> UserError | None:
    """What comes up anywhere, and is no fault of the program: memory, a disk, a limit of the system. None for others.

    Args:
        error: what was raised; its causes are looked through.
        arguments: of the command line, for what can be said about going on.
    """
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    for each in causes:
        if (known := _known(each, arguments)) is not None:
            return known
    return None


def _known(error: BaseException, arguments: Sequence[str]) -> UserError | None:
    trains = bool(arguments) and arguments[0] in _TRAINS
    again = "; the same command goes on from the last checkpoint" if trains else "; then start the same command again"
    text = " ".join(str(error).split())[:300]
    if type(error).__name__ == "OutOfMemoryError":
        return UserError(
            f"the card's memory is full: {text[:200]}",
            "Close what else runs on it, lower max_length, or set memory.vram to less than it has.",
        )
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _RUST.search(text)) is not None:
        number = int(found[1])
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return UserError(f"main memory is full: {text or type(error).__name__}", f"Close what fills it{again}.")
    if isinstance(error, RecursionError):
        return UserError(
            f"what is read is nested too deeply: {text}",
            "No honest file is: --verbose shows what was being read. If it is a file of ours, please report it.",
        )
    if isinstance(error, FileNotFoundError) and (gone := _gone(error)) is not None:
        return gone
    if number in _ON_DISK:
        what, cure = _ON_DISK[number]
        return UserError(f"{what}: {_place(error, text)}", cure.format(again=again))
    return None


def _gone(error: FileNotFoundError) -> UserError | None:
    """Where a whole folder went away beneath a command: the working directory, or that of a file it was at. Else None."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return UserError("the working directory is gone: it was removed or moved.", "Change to one that is there (cd).")
    if error.filename and not isinstance(error.filename, int):
        folder = os.path.dirname(os.path.abspath(os.fsdecode(error.filename)))
        if not os.path.lexists(folder):
            return UserError(
                f"{_place(error, '')}: its folder is gone: it was removed, moved, or its disk taken away.",
                "Put it back, or start the command again.",
            )
    return None


def _place(error: BaseException, text: str) -> str:
    """The file that an error of the system names, or else all it says."""
    if isinstance(error, OSError) and error.filename is not None:
        name = str(error.filename)
        return f"{name if len(name) <= 300 else name[:60] + '…'} ({error.strerror})"
    return text


def abandon(stream: IO[str] | None) -> None:
    """Let what a stream still holds go nowhere: it cannot be written, and would fail again when Python ends."""
    if stream is None:
        return
    try:
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):
        pass  # closed already, or no file at all


def flushed(code: int) -> int:
    """The exit code, once what was printed has really gone out; a pipe or a disk may refuse its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BrokenPipeError:
            abandon(stream)
            code = code or 128 + signal.SIGPIPE
        except OSError:
            abandon(stream)
            code = code or 2
    return code
