"""Excluded questions, such as those of TruthfulQA, and the prompts that repeat them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config.load import DatasetSpec
from ..data.formats import ROLES
from ..data.load import Source, open_source
from ..errors import UserError
from ..io.text import read_text, shown

# columns of questions, in the order of preference
COLUMNS = ("question", "instruction", "prompt", "turns", "text")
_WORD = re.compile(r"\w+")
# a shorter question may be part of any text: it has to be the whole prompt
_CONTAINED_WORDS, _KEY_WORDS = 6, 4


class Questions:
    """A set of questions, compared by their words: case, punctuation and spaces do not matter."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._whole = {words for text in texts if (words := _words(text))}
        self._by_start: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for words in sorted(self._whole):
            if len(words) >= _CONTAINED_WORDS:
                self._by_start.setdefault(words[:_KEY_WORDS], []).append(words)

    def __len__(self) -> int:
        return len(self._whole)

    def found_in(self, prompt: str) -> str:
        """Why a prompt is excluded: it is a question, or contains one of at least six words (as the prompts of FLAN do, within
        a template). "" if it is not."""
        if not self._whole:
            return ""
        words = _words(prompt)
        if words in self._whole:
            return "is an excluded question"
        for start in range(len(words) - _CONTAINED_WORDS + 1):
            for question in self._by_start.get(words[start : start + _KEY_WORDS], ()):
                if words[start : start + len(question)] == question:
                    return "contains an excluded question"
        return ""


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def read_questions(name: str) -> list[str]:
    """The questions of a file or of a data set on the hub.

    Args:
        name: a text file with one question a line; or JSONL, JSON, CSV, Parquet, a folder or a hub id with one of ``COLUMNS``.
            ID:SPLIT is one of several splits, ID:NAME:SPLIT that of one of several configurations
            (truthfulqa/truthful_qa:generation:validation).

    Raises:
        UserError: it cannot be read, or has no such column or no question.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == ".txt":
        found = read_text(path, name=name).splitlines()
    else:
        source, *rest = [name] if path.exists() else name.split(":")
        if len(rest) > 2 or not all([source, *rest]):
            raise UserError(f"{name}: is neither a path nor ID, ID:SPLIT or ID:NAME:SPLIT.")
        spec = DatasetSpec(path=source, split=rest[-1] if rest else None, name=rest[0] if len(rest) == 2 else None)
        rows = open_rows(spec, f"--exclude {name}:{{}}")
        names = {column.lower(): column for column in rows.columns}
        columns = [names[wanted] for wanted in COLUMNS if wanted in names]
        if not columns:
            raise UserError(
                f"{name}: found columns {shown(', '.join(rows.columns), 500)}; questions are in none of them.",
                f"Name the column one of {', '.join(COLUMNS)}, or give a .txt file with one question a line.",
            )
        found = [text for row in rows.select_columns(columns[:1]) for text in texts_of(row.get(columns[0]))]
    found = [text for text in found if _words(text)]
    if not found:
        raise UserError(f"{name}: no question in it.")
    return found


def texts_of(value: Any) -> Iterator[str]:
    """All texts of a value, except assistants' turns: phrases such as "let me know if …" are in many answers."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        role = value.get("role") or value.get("from")
        if not isinstance(role, str) or ROLES.get(role.lower()) != "assistant":
            yield from texts_of([part for key, part in value.items() if key not in ("role", "from")])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from texts_of(part)


def open_rows(spec: DatasetSpec, option: str) -> Source:
    """Open a source of at least one row. ``option``: how the command line names a split, ``{}`` in it, for hints."""
    try:
        rows = open_source(spec)
    except UserError as error:
        if likely := re.search(r"dataset\.split=([^\s)]+)", error.hint):
            raise UserError(error.message, f"Name it: {option.format(likely[1])}.") from None
        raise
    if len(rows) == 0:
        raise UserError(f"{rows.label}: empty; there is no row in it.")
    return rows
