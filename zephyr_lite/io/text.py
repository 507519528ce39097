"""Text: values as parts of messages, JSON and text files read whole, and paths that a user names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import UserError

T = TypeVar("T", bound=BaseModel)
AGAIN = "Copy the file again from where it came from."
TEXT_BYTES = 64 * 2**20
is_file, is_folder = os.path.isfile, os.path.isdir  # unlike Path's, False for names that no file can have (too long)
# pydantic's errors, where its own sentences are no plain English
_EXPECTED = {
    "missing": "is missing",
    "extra_forbidden": "there is no such key",
    "string_type": "expected a text in quotes",
    "int_parsing": "expected a whole number, without a unit",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_parsing": "expected a number, without a unit",
    "float_type": "expected a number",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "list_type": "expected a list",
    "dict_type": "expected keys and values",
    "model_type": "expected keys and values",
}
_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)")


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``1 h 20 min``, ``2.5 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min" if minutes < 600 else f"{minutes / 60:.0f} h"
    return f"{minutes / 1440:.1f} days"


def counted(number: int, what: str) -> str:
    """``1 row``, ``1,200 rows``."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def short(value: object, length: int = 80) -> str:
    """The repr of a value, cut to ``length``."""
    return shown(repr(value), length)


def shown(text: object, limit: int = 80) -> str:
    """A text from elsewhere as part of a message: one line without control characters, cut to ``limit``."""
    line = str(text)
    line = line if line.isprintable() else line.encode("unicode_escape", "backslashreplace").decode("ascii")
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def expected(fault: Mapping[str, Any]) -> str:
    """What is wrong with a value, from an item of pydantic's ``ValidationError.errors()``."""
    message = str(fault["msg"]).removeprefix("Value error, ")
    bound = "a number " if fault["type"].startswith(("greater", "less")) else ""
    return _EXPECTED.get(fault["type"], message.replace("Input should be ", f"expected {bound}"))


def check_values(kind: type[T], values: Mapping[str, Any], file: Path, hint: str) -> T:
    """The values of a JSON file as a model of pydantic's; a UserError names the first that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: {shown(key)} is {short(first['input'], 40)}: {expected(first)}.", hint) from None


def read_object(path: Path, *, hint: str = AGAIN) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        hint: what to do if it cannot be read.
    """
    if not path.is_file():  # a pipe would block
        raise UserError(f"{path}: there is no such file.", hint)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}).", hint) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}.", hint)
    return value


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


def looks_local(name: str) -> bool:
    """Whether a name can only be a path, and not a repository of the hub (OWNER/NAME). Runs are in ``runs/``."""
    return name.startswith((".", "/", "~", "\\", "runs/")) or name.count("/") > 1 or is_file(name)


def comma_list(value: Any) -> Any:
    """``a,b`` as a list; any other value, and the path of a file or folder with a comma, as it is."""
    if not isinstance(value, str) or "," not in value or os.path.exists(os.path.expanduser(value)):
        return value
    return [part.strip() for part in value.split(",")]


def refuse_special(path: Path, name: str) -> None:
    """Raise a UserError if a path exists and is neither a file nor a folder: reading a device or pipe may never end.

    Args:
        name: as the user wrote it.
    """
    if os.path.exists(path) and not is_file(path) and not is_folder(path):
        raise UserError(
            f"{name}: is a device or a pipe, not a file.", "Save its content to a file first, and name that."
        )


def read_text(path: Path, *, limit: int = TEXT_BYTES, name: str | None = None) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        limit: in bytes; a larger file is refused.
        name: as the user wrote it; the path by default.
    """
    name = str(path) if name is None else name
    refuse_special(path, name)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: cannot be read: {why}.", f"The working directory is {Path.cwd()}.") from None
    if len(data) > limit:
        raise UserError(f"{name}: larger than {limit:,} bytes.", "Name the right file.")
    at = data.find(b"\0")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start
    if at >= 0:
        number, byte = data[:at].count(b"\n") + 1, data[at]
        raise UserError(f"{name} line {number}: not text in UTF-8 (byte 0x{byte:02x}).", "Save the file as UTF-8.")
    return text
