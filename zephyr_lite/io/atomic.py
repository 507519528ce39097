"""Atomic writes, the lock of a folder, and manifests.

A file or folder is written under a temporary name, flushed to the disk and renamed. A reader, or the next start after a
crash or a power failure, finds the old one or the new one. A write that fails leaves the old one and removes the
temporary one. Temporary names are ``.NAME.xxxxxxxx``; those of killed processes are removed by the next write of NAME,
and by ``sweep``.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ..errors import UserError
from .redact import redact

COPY_CHUNK = 16 * 2**20
MANIFEST, MANIFEST_FORMAT = "manifest.json", 1
LOCK_FILE = ".lock"
_DISK_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_ASIDE = re.compile(r"\.(?P<old>old-)?(?P<name>.+)\.[0-9a-f]{8}")


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text about a run, without secrets (see ``redact``); data is written with ``file_aside``, unchanged."""
    with bytes_aside(path) as file:
        file.write(redact(text).encode())


@contextmanager
def file_aside(path: Path) -> Iterator[codecs.StreamWriter]:
    """A text file to write (UTF-8, newlines unchanged), which becomes ``path`` when the block ends without an error.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    with bytes_aside(path) as file:
        yield codecs.getwriter("utf-8")(file)


@contextmanager
def bytes_aside(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which becomes ``path`` when the block ends without an error.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    with _aside(path, Path.touch) as aside, open(aside, "wb") as file:
        yield file


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` (replacing an existing one) when the block ends without an error.

    Raises:
        OSError: it cannot be written; names the file.
    """
    with _aside(target, Path.mkdir) as aside:
        yield aside


@contextmanager
def _aside(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A temporary file or folder beside ``path``, which replaces it when the block ends without an error."""
    sweep(path.parent, path.name)
    suffix = f"{path.name}.{secrets.token_hex(4)}"
    aside, old = path.with_name(f".{suffix}"), path.with_name(f".old-{suffix}")
    with _named(path, aside):
        try:
            make(aside)
            handle = os.open(aside, os.O_RDONLY)
            try:
                _flock(handle)  # tells ``sweep`` in other processes that this one is alive
                yield aside
                for written in (*aside.rglob("*"), aside):
                    if not written.is_symlink():
                        _flush(written)
                if aside.is_dir() and os.path.lexists(path):
                    os.replace(path, old)  # until the next rename the folder is missing; ``sweep`` restores it
                os.replace(aside, path)
                _flush(path.parent)
            finally:
                os.close(handle)
        finally:
            remove_tree(aside)
            sweep(path.parent, path.name)


def make_folder(folder: Path, option: str = "--out") -> None:
    """Create the folder that an option or key names, with a UserError where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error.strerror}.", f"Choose another {option}.") from None


def refuse_others(folder: Path, ours: bool, what: str, hint: str = "Choose another --out.") -> None:
    """Raise a UserError if a folder holds files and is not ``ours``, which is ``what`` the command makes."""
    names = sorted(path.name for path in folder.glob("*") if path.name != LOCK_FILE)
    if names and not ours:
        raise UserError(f"{folder} exists and is not {what} (it holds {', '.join(names[:3])}).", hint)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content."""
    with source.open("rb") as file, bytes_aside(target) as out:
        shutil.copyfileobj(file, out, COPY_CHUNK)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file; a write that fails is taken back.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    data = (line + "\n").encode("utf-8")
    with _named(path, path), open(path, "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def sync_file(path: Path) -> None:
    """Flush a file and its folder's entry to the disk."""
    _flush(path)
    _flush(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder; if that is interrupted, no half of it keeps its name.

    Raises:
        OSError: it cannot be renamed. Files that cannot be deleted stay until the next ``sweep``.
    """
    doomed = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with _named(path, doomed):
        os.replace(path, doomed)
    remove_tree(doomed)


def remove_tree(path: Path) -> None:
    """Delete a folder, file or link as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files and folders of killed processes; those of living ones stay.

    Args:
        name: only temporaries of this target; None: all in the folder.
    """
    for left in sorted(folder.glob(".*.????????")):
        found = _ASIDE.fullmatch(left.name)
        if found is None or name not in (None, found["name"]):
            continue
        with suppress(OSError):  # its process has just finished it, or it cannot be read
            handle = os.open(left, os.O_RDONLY | os.O_NONBLOCK)
            in_use = not _flock(handle)
            os.close(handle)
            if in_use:
                continue
            if found["old"] and not os.path.lexists(folder / found["name"]):
                os.replace(left, folder / found["name"])
            else:
                remove_tree(left)


def check_room(folder: Path, size: int, what: str) -> None:
    """Raise a UserError if the disk has less than ``size`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder}: {free / 1e9:.2f} GB are free, {what} takes {size / 1e9:.2f} GB.",
            "Free some space, and run the same command again.",
        )


def _flush(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk: without the latter a rename may be lost in a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems without fsync for folders
            raise
    finally:
        os.close(handle)


def _flock(handle: int) -> bool:
    """Lock an open file or folder without waiting, until the handle is closed. False: another process has locked it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)  # others come from a file system without locks
    return True


@contextmanager
def _named(path: Path, aside: Path) -> Iterator[None]:
    """The system's errors raised in the block name ``path`` instead of the temporary ``aside`` or nothing."""
    try:
        yield
    except OSError as error:
        # a full disk is reported without a name
        found = str(aside) if error.filename is None and error.errno in _DISK_ERRORS else str(error.filename)
        if str(aside) not in found:
            raise
        raise OSError(error.errno, error.strerror, found.replace(str(aside), str(path))) from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock of a folder while the block runs: one process at a time works on a run. The same process may
    enter again.

    The system frees the lock however a process ends. The folder is made if it is missing, and removed again with the
    lock if it is still empty at the end.

    Raises:
        UserError: another process holds the lock, or the folder cannot be made.
    """
    folder = Path(os.path.abspath(folder))
    path = folder / LOCK_FILE
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    make_folder(folder, "output_dir")
    lock = FileLock(path, timeout=0, thread_local=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        holder = " on ".join(path.read_text(encoding="utf-8", errors="replace").split()[:2])
        raise UserError(
            f"{folder}: process {holder} works here.", "Wait for it, end it, or choose another output_dir."
        ) from None
    try:
        if lock.lock_counter == 1:
            path.write_text(f"{os.getpid()}\n{platform.node()}\n", encoding="utf-8")
        yield
    finally:
        if lock.lock_counter == 1:
            path.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # not empty
            for each in made:
                each.rmdir()


def write_manifest(folder: Path) -> None:
    """Write ``manifest.json``: {"format": 1, "files": {name: {"bytes": …, "sha256": …}}} of every other file in a folder and
    below it."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_json(folder / MANIFEST, {"format": MANIFEST_FORMAT, "files": files})


def manifest_fault(folder: Path) -> str | None:
    """The first difference between a folder and its manifest, in words that follow the folder's name; None: there is none.
    Files that the manifest does not name do not matter."""
    try:
        told = json.loads((folder / MANIFEST).read_bytes())["files"]
        files = [(name, each["bytes"], each["sha256"]) for name, each in told.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or damaged"
    for name, size, digest in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _sha256(path) != digest:
            return f"{name} has another hash than was written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
