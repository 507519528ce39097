"""``zephyr-lite``, and ``python -m zephyr_lite``: signals first, then everything that takes time to import."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    sys.path.pop(0)  # the current folder: a random.py there would be imported for the library's

import atexit
import os
import signal


def _end(number: int, frame: object) -> None:
    """Nothing has begun: there is nothing to put in order, and a traceback of imports would tell nobody anything."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def main() -> None:
    """The entry point of the installed command."""
    if sys.platform == "win32":  # files are locked with fcntl, which Windows does not have
        sys.stderr.write("error: zephyr-lite does not run on native Windows.\nInstall it and run it inside WSL2.\n")
        sys.exit(2)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup and shells want it for what runs in the background
            signal.signal(number, _end)
    from .cli import app as cli

    for number, handler in before.items():
        signal.signal(number, handler)
    try:
        cli.main()
    except SystemExit as done:
        if done.code == 130:
            # Python may remember an interrupt that was caught, and end itself by SIGINT instead of with this code
            atexit._run_exitfuncs()
            os._exit(130)
        sys.exit(done.code)


if __name__ == "__main__":
    main()
