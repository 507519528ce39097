"""Paths that a user names, and text files read whole."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import UserError

TEXT_BYTES = 64 * 2**20
_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)")


def place(value: str) -> str:
    """Check a path or hub id, and expand ``~/``.

    Raises:
        ValueError: it is empty, holds a control character, or is the URL of a page of the hub.
    """
    if not value.strip():
        raise ValueError("is empty")
    if not value.isprintable():
        raise ValueError("holds a control character, or bytes that are no UTF-8")
    if (page := _PAGE.match(value)) is not None:
        raise ValueError(f"is a page's address; the hub's id alone is read: {page[1]}")
    return os.path.expanduser(value) if value.startswith("~/") else value


def refuse_special(path: Path, name: str) -> None:
    """Raise a UserError if a path exists and is neither a file nor a folder: reading a device or pipe may never end.

    Args:
        name: as the user wrote it.
    """
    try:
        special = path.exists() and not path.is_file() and not path.is_dir()
    except PermissionError as error:
        raise UserError(f"{name}: cannot be opened: {error.strerror}.", "Name another file.") from None
    except (OSError, ValueError):  # no file can have this name
        return
    if special:
        raise UserError(
            f"{name}: is a device or a pipe, not a file.", "Save its content to a file first, and name that."
        )


def is_file(path: Path) -> bool:
    """Whether there is a file; False also for names that no file can have (too long)."""
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
        limit: in bytes; a larger file is refused.
        name: as the user wrote it; the path by default.

    Raises:
        UserError: it cannot be read, is too large, is not UTF-8, or holds NUL bytes.
    """
    name = str(path) if name is None else name
    refuse_special(path, name)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(
            f"{name}: cannot be read: {error.strerror}.", f"The working directory is {Path.cwd()}."
        ) from None
    except ValueError as error:
        raise UserError(f"{name!r}: is not a file name: {error}.", "Name another file.") from None
    if len(data) > limit:
        raise UserError(f"{name}: larger than {limit:,} bytes.", "Name the right file.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{name} line {number}: not UTF-8 (byte 0x{data[error.start]:02x}).", "Save the file as UTF-8."
        ) from None
    if "\0" in text:
        number = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{name} line {number}: a NUL byte; this is no text file.", "Save the file as UTF-8.")
    return text
