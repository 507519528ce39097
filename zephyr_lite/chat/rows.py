"""Rows that a user's talk adds to a JSONL file, of which there may be some already."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.formats import Method, detect, normalise
from ..data.messages import RowError
from ..errors import UserError
from ..io.atomic import append_line, sync_file
from ..io.strict_json import shown

# So much of a file's beginning is looked at: the first row, whatever comes behind it.
_HEAD = 2**20


def check_file(path: Path, method: Method, option: str) -> int:
    """Whether rows may be added to a file: there is none yet, or it holds rows of this kind.

    Args:
        method: sft: conversations; dpo: preference pairs.
        option: what names the file, for messages.

    Returns:
        how many lines it has.

    Raises:
        UserError: its folder is missing, it is no JSONL, or its rows are of another kind.
    """
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder.", "Name a file, such as my.jsonl.")
    if not path.parent.is_dir():
        raise UserError(
            f"{option} {path}: there is no folder {path.parent}.", "Make it first, or choose another place."
        )
    if path.suffix.lower() != ".jsonl":
        raise UserError(f"{option} {path}: training reads such rows from a .jsonl file.", f"Name it {path.stem}.jsonl.")
    if not path.exists():
        return 0
    with path.open("rb") as file:
        head = file.read(_HEAD)
        file.seek(0)
        lines = sum(block.count(b"\n") for block in iter(lambda: file.read(_HEAD), b""))
    first = head.lstrip().split(b"\n", 1)[0]
    if not first:
        return 0
    try:
        row = json.loads(first.decode("utf-8"))
        if not isinstance(row, dict):
            raise ValueError
        detect(list(row), method, str(path))
        normalise(row, method)
    except (ValueError, RecursionError):
        raise UserError(f"{option} {path}: its first line is not a JSON object.", "Choose another file.") from None
    except UserError as error:
        raise UserError(f"{option} {error.message}", "Choose another file.") from None
    except RowError as error:
        raise UserError(f"{option} {path} row 1: {error}.", "Choose another file.") from None
    return lines if _ends_a_line(path) else lines + 1


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows: all of them or none, on the disk when this returns.

    Raises:
        OSError: it cannot be written; names ``path``.
        UserError: a text that is no valid Unicode, which no file of text can hold.
    """
    try:
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{shown(str(path))}: a turn holds text that is not valid Unicode.", "/undo takes it back."
        ) from None
    # a line that somebody else began is ended first, or two rows would become one
    append_line(path, ("" if _ends_a_line(path) else "\n") + text)
    sync_file(path)


def _ends_a_line(path: Path) -> bool:
    """Whether what is there ends with a newline; also where nothing is there."""
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                return True
            file.seek(-1, 2)
            return file.read(1) == b"\n"
    except FileNotFoundError:
        return True
