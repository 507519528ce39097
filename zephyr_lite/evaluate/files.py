"""Rows of published files, JSON or JSONL, local or on the hub, as pydantic models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError

from ..errors import UserError
from ..io.text import read_text, shown

Row = TypeVar("Row", bound=BaseModel)
MAX_BYTES = 2**30
OptionalText = Annotated[str, BeforeValidator(lambda value: value if isinstance(value, str) else "")]


def json_rows(path: Path) -> list[Any]:
    """The rows of a JSON list, or of JSONL.

    Raises:
        UserError: it is neither, or empty.
    """
    text = read_text(path, limit=MAX_BYTES)
    is_list = text.lstrip().startswith("[")
    rows: list[Any] = []
    # not splitlines(): a text may hold U+2028 or U+0085, which do not end a line of JSONL
    for number, line in enumerate([text] if is_list else text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            where = path if is_list else f"{path} line {number}"
            raise UserError(f"{where}: not valid JSON ({error}).", "Give a JSON list, or JSONL.") from None
    rows = rows[0] if is_list else rows
    if not rows:
        raise UserError(f"{path}: is empty.", "Give a JSON list of objects, or JSONL.")
    return rows


def parse_rows(rows: Sequence[Any], kind: type[Row], label: str, hint: str) -> list[Row]:
    """Rows as models.

    Raises:
        UserError: a key of a row is missing or wrong.
    """
    parsed = []
    for number, row in enumerate(rows, 1):
        try:
            parsed.append(kind.model_validate(row))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = "".join(f"{part}: " for part in first["loc"])
            found = "" if first["type"] == "missing" else f", found {shown(first['input'])}"
            raise UserError(f"{label} row {number}: {place}{first['msg']}{found}.", hint) from None
    return parsed


def read_rows(path: str | Path, kind: type[Row], hint: str) -> list[Row]:
    """``parse_rows`` of a file."""
    return parse_rows(json_rows(Path(path)), kind, str(path), hint)


def from_hub(fetch: Callable[..., str], name: str, *args: Any, **options: Any) -> Path:
    """``fetch(name, …)`` of huggingface_hub, on a data set.

    Raises:
        UserError: no network, no such data set, no access.
    """
    try:
        return Path(fetch(name, *args, repo_type="dataset", **options))
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{'/'.join([name, *args])}: no such file or folder here, and it cannot be fetched from the hub: {why}",
            "Check the name and the network (HF_HUB_OFFLINE?), or give a file.",
        ) from None
