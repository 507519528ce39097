"""Rows that chat adds to a JSONL file, new or with rows of the same kind in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.formats import Method, RowError, detect, normalise
from ..errors import UserError
from ..io.atomic import append_line, sync_file
from ..io.text import shown


def check_file(path: Path, method: Method, option: str) -> int:
    """Check that rows may be added to a file: it does not exist, or its first row is of this kind.

    Args:
        method: sft: conversations; dpo: preference pairs.
        option: what names the file, for messages.

    Returns:
        its number of lines.

    Raises:
        UserError: its folder is missing, it is not JSONL, or its rows are of another kind.
    """
    if path.suffix.lower() != ".jsonl":
        raise UserError(f"{option} {path}: training reads such rows from a .jsonl file.", f"Name it {path.stem}.jsonl.")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}.", "Make it first.")
    if not path.exists():
        return 0
    first, lines = b"", 0
    with path.open("rb") as file:
        for line in file:
            first, lines = first or line.strip(), lines + 1
    if not first:
        return 0
    try:
        row = json.loads(first)
        if not isinstance(row, dict):
            raise ValueError
        detect(list(row), method, str(path))
        normalise(row, method)
    except ValueError:
        raise UserError(f"{option} {path}: its first line is not a JSON object.", "Choose another file.") from None
    except UserError as error:
        raise UserError(f"{option} {error.message}", "Choose another file.") from None
    except RowError as error:
        raise UserError(f"{option} {path} row 1: {error}.", "Choose another file.") from None
    return lines


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows, all of them or none; they are on the disk when this returns.

    Raises:
        OSError: it cannot be written; names ``path``.
        UserError: a text is not valid Unicode, which a text file cannot hold.
    """
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{shown(str(path))}: a turn holds text that is not valid Unicode.", "/undo takes it back."
        ) from None
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                text = "\n" + text
    append_line(path, text)
    sync_file(path)
