"""JSON files from elsewhere: errors name the file and the fault."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import UserError

AGAIN = "Copy the file again from where it came from."


def shown(text: object, limit: int = 80) -> str:
    """A text from elsewhere as part of a message: one line without control characters, cut to ``limit``."""
    line = str(text)
    line = line if line.isprintable() else line.encode("unicode_escape", "backslashreplace").decode("ascii")
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def parse(raw: bytes, *, strict: bool = True) -> Any:
    """Parse a JSON document in UTF-8.

    Args:
        strict: refuse an object with two equal keys.

    Raises:
        ValueError: says what is wrong.
    """
    try:
        text = raw.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique if strict else None)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a surrogate pair") from None
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def read_object(path: Path, *, strict: bool = True, hint: str = AGAIN) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        strict: see ``parse``.
        hint: what to do if it cannot be read.

    Raises:
        UserError: it does not exist, is not JSON, or is not an object.
    """
    if not path.is_file():  # a pipe would block
        raise UserError(f"{path}: there is no such file.", hint)
    try:
        value = parse(path.read_bytes(), strict=strict)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.", hint) from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).", hint) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}.", hint)
    return value


def is_whole(value: object) -> bool:
    """Whether a value is an integer, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} occurs twice in one object")
    return result
