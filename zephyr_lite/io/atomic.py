"""Atomic writes: a file or folder is written under a temporary name, flushed to the disk and renamed.

A reader, or the next start after a crash or a power failure, finds the old file (or folder) or the new one. A write
that fails leaves the old one and removes the temporary one. Temporary names are ``.NAME.xxxxxxxx``; those of killed
processes are removed by the next write of NAME, and by ``sweep``.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from ..errors import UserError
from .redact import redact

COPY_CHUNK = 16 * 2**20
_ASIDE = re.compile(r"\.(?P<old>old-)?(?P<name>.+)\.[0-9a-f]{8}")
# libraries written in Rust (tokenizers, safetensors) give the system's error number in their message only
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_DISK_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text about a run, without secrets (see ``redact``); data is written with ``file_aside``, unchanged.

    Raises:
        OSError: as ``file_aside``.
    """
    with file_aside(path) as file:
        file.write(redact(text))


@contextmanager
def file_aside(path: Path) -> Iterator[IO[str]]:
    """A text file to write (UTF-8, newlines unchanged), which becomes ``path`` when the block ends without an error.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    with bytes_aside(path) as binary:
        text = io.TextIOWrapper(binary, encoding="utf-8", newline="\n", write_through=True)
        try:
            yield text
        finally:
            text.detach()


@contextmanager
def bytes_aside(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which becomes ``path`` when the block ends without an error.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    aside = _aside(path)
    sweep(path.parent, path.name)
    with _named(path, aside):
        try:
            with open(aside, "xb") as file:
                flock(file.fileno())  # tells ``sweep`` in other processes that this one is alive
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            remove_tree(aside)
            raise
        sync_folder(path.parent)


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` (replacing an existing one) when the block ends without an error.

    Raises:
        OSError: it cannot be written; names the file.
    """
    aside = _aside(target)
    sweep(target.parent, target.name)
    with _named(target, aside):
        aside.mkdir()
        handle = os.open(aside, os.O_RDONLY)
        try:
            flock(handle)  # tells ``sweep`` in other processes that this one is alive
            yield aside
            _sync_tree(aside)
            _replace_folder(aside, target)
            sync_folder(target.parent)
        finally:
            os.close(handle)
            remove_tree(aside)


def _replace_folder(aside: Path, target: Path) -> None:
    if not os.path.lexists(target):
        os.replace(aside, target)
        return
    old = target.with_name(f".old-{target.name}.{secrets.token_hex(4)}")
    os.replace(target, old)  # between this and the next rename the folder is missing; ``sweep`` restores it
    try:
        os.replace(aside, target)
    except OSError:
        os.replace(old, target)
        raise
    remove_tree(old)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content.

    Raises:
        OSError: it cannot be read or written.
    """
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
    with _named(path, path), open(path, "rb") as file:
        os.fsync(file.fileno())
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents.

    Raises:
        OSError: it cannot be made.
    """
    path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder; if that is interrupted, no half of it keeps its name.

    Raises:
        OSError: it cannot be renamed. Files that cannot be deleted stay until the next ``sweep``.
    """
    doomed = _aside(path)
    with _named(path, doomed):
        os.replace(path, doomed)
    remove_tree(doomed)


def remove_tree(path: Path) -> None:
    """Delete a folder, file or link as far as possible."""
    with suppress(OSError):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files and folders of killed processes; those of living ones stay.

    Args:
        name: only temporaries of this target; None: all in the folder.
    """
    for left in sorted(folder.glob(".*.????????")):
        found = _ASIDE.fullmatch(left.name)
        if found is None or name not in (None, found["name"]) or _in_use(left):
            continue
        target = folder / found["name"]
        if found["old"] and not os.path.lexists(target):
            with suppress(OSError):
                os.replace(left, target)
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


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk: without it a rename may be lost in a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems without fsync for folders
            raise
    finally:
        os.close(handle)


def flock(handle: int) -> bool:
    """Lock an open file or folder without waiting, until the handle is closed. False: another process has locked it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _in_use(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return not flock(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder, topdown=False):
        for path in (Path(place, name) for name in sorted(names)):
            if not path.is_symlink():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        sync_folder(Path(place))


@contextmanager
def _named(path: Path, aside: Path) -> Iterator[None]:
    """OSErrors raised in the block name ``path`` instead of the temporary ``aside``."""
    try:
        yield
    except OSError as error:
        found = "" if error.filename is None else str(error.filename)
        ours = str(aside) in found if found else error.errno in _DISK_ERRORS
        if not ours:
            raise
        name = found.replace(str(aside), str(path)) or str(path)
        raise OSError(error.errno, error.strerror, name) from error
    except Exception as error:
        found_number = _RUST_ERROR.search(str(error))
        if found_number is None or (number := int(found_number[1])) not in _DISK_ERRORS:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")
