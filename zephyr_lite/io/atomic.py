"""How a run's files are written: aside, flushed to the disk, renamed, and the folder that names them flushed too.

Whoever looks, a reader, the next start after a crash or a power failure, finds the file (or the whole folder) of before
or the new one. A write that fails leaves what was there, takes away what it had begun, and raises an OSError that names
the file. What a killed process left aside, ``.NAME.xxxxxxxx``, is removed by the next that writes NAME, and by ``sweep``.

Everything that reaches the disk passes the functions at the end of this file; the tests make each of their calls fail.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from ..errors import UserError
from .flock import flock
from .redact import redact

BUFFER = 1 << 20
COPY_CHUNK = 16 * 2**20
_ASIDE = re.compile(r"\.(?P<old>old-)?(?P<name>.+)\.[0-9a-f]{8}")
# libraries written in Rust put the system's error number into a text of their own; these are of writing
_FOREIGN = re.compile(r"\(os error (\d+)\)")
_OF_WRITING = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# folders that are being filled, and what they become
_filling: dict[Path, Path] = {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text about a run, without the environment's secrets; what is data goes through ``file_aside`` as it is.

    Raises:
        OSError: as ``file_aside``.
    """
    with file_aside(path) as file:
        file.write(redact(text))


@contextmanager
def file_aside(path: Path) -> Iterator[IO[str]]:
    """A text file to write (UTF-8, newlines as they are), which becomes ``path`` when the block ends without an error.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    with bytes_aside(path) as binary:
        text = io.TextIOWrapper(binary, encoding="utf-8", newline="\n", write_through=True)
        try:
            yield text
        finally:
            text.detach()  # it would close the file otherwise, which is not its to close


@contextmanager
def bytes_aside(path: Path) -> Iterator[BinaryIO]:
    """A file of bytes to write, which becomes ``path`` when the block ends without an error.

    In a folder that is being filled (``folder_aside``) it is written in place: that folder is flushed and renamed as one.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    inside = _within(path) is not None
    place = path if inside else _aside(path)
    if not inside:
        sweep(path.parent, path.name)
    with _named(path):
        handle = _open(place, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if inside else os.O_EXCL))
    raw = _Raw(handle, path)
    file = io.BufferedWriter(raw, BUFFER)
    try:
        if not inside:
            flock(handle)  # tells others that this process is at work here, for as long as it lives
        yield file
        file.flush()
        if not inside:
            with _named(path):
                _fsync(handle)
                _rename(place, path)
                sync_folder(path.parent)
    except BaseException:
        raw.dead = True
        if not inside:
            with suppress(OSError):
                _unlink(place)
        raise
    finally:
        file.close()


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """A folder to fill, by whatever means, which becomes ``target`` (replacing one that is there) when the block ends
    without an error: every file and folder in it is flushed first.

    Raises:
        OSError: it cannot be written; names what.
    """
    aside = _aside(target)
    sweep(target.parent, target.name)
    with _named(target):
        _mkdir(aside)
    handle = _handle(aside)
    _filling[aside.absolute()] = target
    try:
        if handle is not None:
            flock(handle)  # tells others that this process is at work here, for as long as it lives
        try:
            yield aside
        except Exception as error:
            found = _FOREIGN.search(str(error)) if not isinstance(error, OSError) else None
            if found is not None and (number := int(found[1])) in _OF_WRITING:
                raise OSError(number, os.strerror(number), str(target)) from error
            raise
        with _named(target):
            _sync_tree(aside)
            _put(aside, target)
            sync_folder(target.parent)
    finally:
        _filling.pop(aside.absolute(), None)
        if handle is not None:
            os.close(handle)
        remove_tree(aside)  # what was begun, or what was there before


def _put(aside: Path, target: Path) -> None:
    """``aside`` becomes ``target``; what was there is at ``aside`` then, or gone."""
    if not os.path.lexists(target):
        _rename(aside, target)
    elif not _exchange(aside, target):
        old = target.with_name(f".old-{target.name}.{secrets.token_hex(4)}")
        _rename(target, old)  # between this and the next the folder is missing; ``sweep`` brings it back
        try:
            _rename(aside, target)
        except OSError:
            with suppress(OSError):
                _rename(old, target)
            raise
        remove_tree(old)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content.

    Raises:
        OSError: it cannot be read or written; names which.
    """
    with source.open("rb") as file, bytes_aside(target) as out:
        while chunk := file.read(COPY_CHUNK):
            out.write(chunk)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file: one write, and where that fails none of it.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    with _named(path):
        handle = _open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            size = os.fstat(handle).st_size
            left = memoryview((line + "\n").encode("utf-8"))
            try:
                while left:
                    left = left[_write(handle, left) :]
            except OSError:
                with suppress(OSError):
                    os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)


def sync_file(path: Path) -> None:
    """Flush a file that was appended to, and its name, to the disk."""
    with _named(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            _fsync(handle)
        finally:
            os.close(handle)
        sync_folder(path.parent)


def rename(source: Path, target: Path) -> None:
    with _named(target):
        _rename(source, target)


def make_folder(path: Path) -> None:
    """The folder and those above it, as far as they are missing.

    Raises:
        OSError: it cannot be made; names it.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    with _named(path):
        for folder in reversed(missing):
            with suppress(FileExistsError):  # made by another process meanwhile; were it a file, the next call says so
                _mkdir(folder)
            sync_folder(folder.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder at once: a half-removed one does not bear its name.

    Raises:
        OSError: it cannot be renamed. What cannot be deleted then stays until the next ``sweep``.
    """
    doomed = _aside(path)
    with _named(path):
        _rename(path, doomed)
    remove_tree(doomed)


def remove_tree(path: Path) -> None:
    """Delete a folder, a file or a link, as far as that is possible."""
    with suppress(OSError):
        if path.is_symlink() or path.is_file():
            _unlink(path)
        elif path.exists():
            _remove_tree(path)


def sweep(folder: Path, name: str | None = None, *, alone: bool = False) -> None:
    """Remove what killed processes left aside in a folder; what a living one is writing stays.

    Args:
        name: only what was to become this; None: everything that is called as ``file_aside`` and ``folder_aside`` do.
        alone: nobody else writes there (a lock is held), so that a file system which knows no locks is no reason to
            leave anything.
    """
    for left in sorted(folder.glob(".*.????????")):
        found = _ASIDE.fullmatch(left.name)
        if found is None or (name is not None and found["name"] != name) or _held(left, unknown=not alone):
            continue
        lost = folder / found["name"]
        if found["old"] and not os.path.lexists(lost):
            with suppress(OSError):
                _rename(left, lost)
        else:
            remove_tree(left)


def check_room(
    folder: Path,
    size: int,
    what: str,
    hint: str = "Free some space; the same command goes on from the last checkpoint.",
) -> None:
    """Raises:
    UserError: the disk has less room than is going to be written.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder}: {free / 1e9:.2f} GB are free, {what} takes {size / 1e9:.2f} GB.",
            hint,
        )


def sync_folder(path: Path) -> None:
    """Flush what a folder says of its files: without it a rename may be forgotten."""
    handle = _handle(path)
    if handle is None:
        return
    try:
        _fsync(handle)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
            errno.EBADF,
        ):  # file systems that cannot do this for folders
            raise
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder, topdown=False):
        for name in sorted(names):  # in the same order wherever it runs
            path = Path(place, name)
            if not path.is_symlink():
                handle = os.open(path, os.O_RDONLY)
                try:
                    with _named(path):
                        _fsync(handle)
                finally:
                    os.close(handle)
        sync_folder(Path(place))


class _Raw(io.RawIOBase):
    """An open file. Once ``dead`` nothing more is written: what is still buffered belongs to a write that failed."""

    def __init__(self, handle: int, path: Path) -> None:
        self.handle, self.path, self.dead = handle, path, False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.handle

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self.handle, offset, whence)

    def write(self, data: Any) -> int:
        if self.dead:
            return len(data)
        with _named(self.path):
            return _write(self.handle, data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self.handle)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The system's errors name the file that was to be, not the one aside; the innermost name stays."""
    try:
        yield
    except OSError as error:
        if not error.__dict__.setdefault("named", False):
            error.__dict__["named"] = True
            error.filename = str(_final(path))
            if error.filename2 is not None:
                del error.filename2  # None would be shown
        raise


def _final(path: Path) -> Path:
    """Where a file of a folder that is being filled is going to be."""
    aside = _within(path)
    return path if aside is None else _final(_filling[aside] / path.absolute().relative_to(aside))


def _within(path: Path) -> Path | None:
    """The folder being filled that a path lies in."""
    return next((folder for folder in path.absolute().parents if folder in _filling), None)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _handle(folder: Path) -> int | None:
    """A folder, open; None where the system opens none (Windows)."""
    return None if sys.platform == "win32" else os.open(folder, os.O_RDONLY)


def _held(path: Path, *, unknown: bool) -> bool:
    """Whether a living process is at work there; ``unknown``: what to say where that cannot be known."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # were it a pipe, opening it would wait
    except OSError:
        return unknown
    try:
        free = flock(handle)
    finally:
        os.close(handle)
    return unknown if free is None else not free


# What touches the disk


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0), 0o666)


def _write(handle: int, data: Any) -> int:
    return os.write(handle, data)


def _fsync(handle: int) -> None:
    os.fsync(handle)


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)


def _exchange(one: Path, other: Path) -> bool:
    """Two names change places, at once; False where the system or the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _mkdir(path: Path) -> None:
    path.mkdir()


def _unlink(path: Path) -> None:
    os.unlink(path)


def _remove_tree(path: Path) -> None:
    shutil.rmtree(path)
