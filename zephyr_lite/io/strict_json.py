"""JSON files of strangers: whatever is wrong with one is said in words, and nothing else comes out of reading it.

Python's own reader takes the last of two equal keys, where another reader takes the first; reads NaN, which is no JSON;
and ends with a RecursionError where brackets are nested deeply.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError

# the largest header that the safetensors format allows; configurations and indices are far smaller
MAX_BYTES = 100_000_000
AGAIN = "Copy the file again from where it came from."


def shown(text: object, limit: int = 80) -> str:
    """A stranger's text as part of a message: one line, no control characters, not endless."""
    line = str(text)
    line = line if line.isprintable() else line.encode("unicode_escape", "backslashreplace").decode("ascii")
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def parse(raw: bytes, *, strict: bool = True) -> Any:
    """A JSON document in UTF-8.

    Args:
        strict: refuse an object with two equal keys, and NaN and Infinity.

    Raises:
        ValueError: says what is wrong with it.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    try:
        if strict:
            value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        else:
            value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ValueError("it holds half a surrogate pair, which no file can be written with") from None
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def read_object(path: Path, *, strict: bool = True, hint: str = AGAIN) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        strict: see ``parse``.
        hint: what to do where it is none.

    Raises:
        UserError: there is no such file, it cannot be read, is too large, is not JSON, or holds something else.
    """
    try:
        if not path.is_file():  # a pipe or a device would be read for ever
            raise UserError(f"{path}: there is no such file.", hint)
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(f"{path}: {size:,} bytes long, where {MAX_BYTES:,} are the most that is read.", hint)
        value = parse(path.read_bytes(), strict=strict)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.", hint) from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).", hint) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}.", hint)
    return value


def is_whole(value: object) -> bool:
    """An integer, and not a truth value (which Python counts among them)."""
    return isinstance(value, int) and not isinstance(value, bool)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
