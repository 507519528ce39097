"""What somebody names: a place that can be one, and text files, read whole, but never a device or a gigabyte."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError

TEXT_BYTES = 64 * 2**20
_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)")

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a disk"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def place(value: str) -> str:
    """A path or an id, which nobody can mean to be empty or to hold a control character; ``~/`` is the user's home, as
    shells have it.

    Raises:
        ValueError: it is or does, or is the address of a page of the hub.
    """
    if not value.strip():
        raise ValueError("is empty")
    if not value.isprintable():
        raise ValueError("holds a control character, or bytes that are no UTF-8")
    if (page := _PAGE.match(value)) is not None:
        raise ValueError(f"is a page's address; the hub's id alone is read: {page[1]}")
    return os.path.expanduser(value) if value.startswith("~/") else value


def refuse_special(path: Path, name: str) -> None:
    """Raise a UserError where a path is there and neither a file nor a folder: a device or a pipe may never end.

    Args:
        path: what is looked at; one that does not exist is no fault here.
        name: as the user wrote it.

    Raises:
        UserError: it is one, its links lead in a circle, or it may not be looked at.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EACCES):
            raise UserError(
                f"{name}: cannot be looked at: {error.strerror}.", "Mend that, or name another file."
            ) from None
        return  # not there: the caller says so
    except ValueError:  # no path at all
        return
    for is_one, kind in _KINDS:
        if is_one(mode):
            raise UserError(f"{name}: is {kind}, not a file.", "Save its content to a file first, and name that.")


def is_file(path: Path) -> bool:
    """Whether there is a file; a name that none can have (too long, say) is no error."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """As ``is_file``, for folders."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_text(path: Path, *, limit: int = TEXT_BYTES, name: str | None = None) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        path: the file.
        limit: in bytes; a larger file is refused before it is read.
        name: as the user wrote it; the path by default.

    Raises:
        UserError: it is no file, cannot be read, is too large, no UTF-8, or holds NUL bytes.
    """
    name = str(path) if name is None else name
    refuse_special(path, name)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        hint = f"The working directory is {Path.cwd()}." if error.errno == errno.ENOENT else "Name another file."
        raise UserError(f"{name}: cannot be read: {error.strerror}.", hint) from None
    except ValueError as error:
        raise UserError(f"{name!r}: names no file: {error}.", "Name another file.") from None
    if len(data) > limit:
        raise UserError(f"{name}: more than {limit:,} bytes, the most that is read here.", "Name the right file.")
    if 0 in data:
        number = data[: data.index(0)].count(b"\n") + 1
        raise UserError(f"{name} line {number}: a NUL byte; this is no text file.", "Save the file as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{name} line {number}: not UTF-8 (byte 0x{data[error.start]:02x}).", "Save the file as UTF-8."
        ) from None
