"""An exclusive lock on a folder: one process at a time works on a run."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UserError

LOCK_FILE = ".lock"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock of a folder while the block runs. The same process may enter again.

    The system frees the lock however a process ends. The folder is made if it is missing, and removed again with the
    lock if it is still empty at the end.

    Raises:
        UserError: another process holds the lock, or the folder cannot be made or locked.
    """
    folder = Path(os.path.abspath(folder))
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    path = folder / LOCK_FILE
    lock = FileLock(path, timeout=0, thread_local=False, is_singleton=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise _refusal(folder, path) from None
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be made or locked: {error.strerror}.",
            "Choose another output_dir, make the folder writable, or free some space.",
        ) from None
    try:
        if type(lock) is FileLock and lock.lock_counter == 1:  # filelock's fallback writes process and host itself
            path.write_text(f"{os.getpid()}\n{platform.node()}\n", encoding="utf-8")
        yield
    finally:
        if lock.lock_counter == 1:
            path.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # not empty
            for made in missing:
                made.rmdir()


def _refusal(folder: Path, path: Path) -> UserError:
    try:
        process, host = path.read_text(encoding="utf-8").splitlines()[:2]
    except (OSError, ValueError):
        return UserError(f"{folder}: another process works here.", "Wait for it, or choose another output_dir.")
    cure = f"end it (kill {process})" if host == platform.node() else "end it there"
    return UserError(
        f"{folder}: process {process} on {host} works here.", f"Wait for it, {cure}, or choose another output_dir."
    )
