"""``zephyr-lite`` and ``python -m zephyr_lite``: signals first, then everything that takes time to import."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    sys.path.pop(0)  # the current folder: a random.py there would be imported for the library's

import io
import os
import signal
from typing import Any


def _end(number: int, frame: Any) -> None:
    """Ends the process quietly while it imports: there is nothing to clean up."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def main(arguments: list[str] | None = None) -> None:
    """The entry point of the installed command.

    Args:
        arguments: of the command line; None: the process's own.
    """
    if sys.platform == "win32":  # files are locked with fcntl, which Windows does not have
        sys.stderr.write("error: zephyr-lite does not run on native Windows.\nInstall it and run it inside WSL2.\n")
        sys.exit(2)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and shells set it for background jobs
            signal.signal(number, _end)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell (2>&-) or by a service
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    from .cli import app
    from .io.interrupts import take_signals

    take_signals()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows ASCII only still gets the rest of a line
    app.leave(app.run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    main()
