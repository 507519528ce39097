"""Prompts of a data set: conversations, pairs, instructions, or a text file with one prompt a line; and excluded questions."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..config.load import DatasetSpec
from ..data.load import summarise
from ..data.messages import ROLES, RowError, as_messages
from ..data.sources import Source, open_source
from ..errors import UserError
from ..io.text import read_text, shown

# columns that may hold a prompt, in this order; "data" is raw UltraChat's, "turns" MT-Bench's
COLUMNS = ("prompt", "instruction", "messages", "conversations", "data", "question", "turns", "text")
_CONVERSATIONS = ("messages", "conversations", "data", "turns")
QUESTIONS = ("question", "instruction", "prompt", "turns", "text")  # that may hold a question to exclude
_SURROGATE = re.compile("[\ud800-\udfff]")
_BESIDE = ("input", "source", "correct_answers", "incorrect_answers")


class PromptsSpec(BaseModel):
    """Where prompts come from: a hub id, a folder in the hub's layout, a file (JSONL, JSON, CSV, Parquet, or text)."""

    model_config = ConfigDict(extra="forbid")

    path: str
    name: str | None = None  # the data set's configuration on the hub
    split: str | None = None
    revision: str | None = None
    limit: int | None = Field(None, ge=1)  # number of rows, by a seeded draw
    column: str | None = None  # the prompt's column, if its name does not say so


PromptsKey = Annotated[PromptsSpec, BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value)]


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    text: str
    where: str  # "prompts.jsonl row 17", counted from 1
    source: str  # the row's ``source`` column, or the name of the file or split
    correct: list[str]  # reference answers that UltraFeedback's rows have for some questions
    incorrect: list[str]

    @property
    def id(self) -> str:
        """SHA-256 of the text, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass
class Prompts:
    """The prompts of a set."""

    label: str
    prompts: list[Prompt] = field(default_factory=list)
    read: int = 0  # rows
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason → the places of the rows that were left out

    def note(self) -> str:
        left = f"; left out: {summarise(self.dropped)}" if self.dropped else ""
        return f"{self.label}: {self.read:,} rows, {len(self.prompts):,} prompts{left}"


def read_prompts(spec: PromptsSpec, *, seed: int) -> Prompts:
    """The prompts of a set, in its order, without repetitions; ``spec.limit`` rows are drawn by the seed.

    The prompt of a conversation is its first user turn. An ``input`` beside an ``instruction`` is appended, as in Alpaca.
    """
    source = open_rows(DatasetSpec(**spec.model_dump(exclude={"limit", "column"})), "--split {}")
    label = source.label
    column = column_of(source.columns, [spec.column] if spec.column else COLUMNS, label, "Name it: --column NAME.")
    rows = source.select_columns([column, *_BESIDE])  # the rest may be large
    numbers = np.arange(len(rows))
    if spec.limit is not None and spec.limit < len(rows):
        numbers = np.sort(np.random.default_rng([seed, 0]).permutation(len(rows))[: spec.limit])
    found = Prompts(label, read=len(numbers))
    seen: set[str] = set()
    for number in numbers.tolist():
        row = rows[number]
        where = f"{label} row {number + 1}"
        try:
            text = _prompt_of(row, column)
            if text in seen:
                raise RowError("the prompt of an earlier row")
        except RowError as error:
            found.dropped.setdefault(str(error), []).append(where)
            continue
        seen.add(text)
        answers = [row.get(name) or ["None"] for name in ("correct_answers", "incorrect_answers")]
        found.prompts.append(Prompt(text, where, str(row.get("source") or Path(label).stem), *answers))
    if not found.prompts:
        raise UserError(
            f"{label}: no prompt in {found.read:,} rows: {summarise(found.dropped)}.",
            f"Another column may hold them: --column NAME, one of {', '.join(source.columns)}.",
        )
    return found


def column_of(columns: Sequence[str], wanted: Sequence[str], label: str, hint: str) -> str:
    """The first of the wanted columns that there is, in any case."""
    names = {column.lower(): column for column in columns}
    for name in wanted:
        if name.lower() in names:
            return names[name.lower()]
    there = shown(", ".join(columns), 500)
    raise UserError(f"{label}: no column holds prompts (found {there}; looked for {', '.join(wanted)}).", hint)


def _prompt_of(row: Mapping[str, Any], column: str) -> str:
    """Raises RowError."""
    value = row.get(column) or ""
    if isinstance(value, list) and all(isinstance(turn, str) for turn in value):
        value = value[0]  # raw UltraChat, MT-Bench: turns without roles
    elif column in _CONVERSATIONS or not isinstance(value, str):
        value = next((m["content"] for m in as_messages(value, column) if m["role"] == "user"), "")
    if not value.strip():
        raise RowError("an empty prompt")
    if column == "instruction" and row.get("input"):
        value = f"{value}\n\n{row['input']}"
    if _SURROGATE.search(value):
        raise RowError("text that is not valid Unicode")
    return value.strip()


# -- excluded questions ------------------------------------------------------------------------------------------------

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
        name: a text file with one question a line; or JSONL, JSON, CSV, Parquet, a folder or a hub id with one of ``QUESTIONS``.
            ID:SPLIT is one of several splits, ID:NAME:SPLIT that of one of several configurations
            (truthfulqa/truthful_qa:generation:validation).
    """
    source, *rest = [name] if Path(name).expanduser().exists() else name.split(":")
    spec = DatasetSpec(path=source, split=rest[-1] if rest else None, name=rest[0] if len(rest) == 2 else None)
    rows = open_rows(spec, f"--exclude {name}:{{}}")
    column = column_of(rows.columns, QUESTIONS, name, "Rename it, or give a .txt file with one question a line.")
    found = [text for row in rows.select_columns([column]) for text in texts_of(row.get(column)) if _words(text)]
    if not found:
        raise UserError(f"{name}: no question in it.")
    return found


# -- rows ----------------------------------------------------------------------------------------------------------------


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
    """Open a source of at least one row; the lines of a text file are rows with the column ``text``.

    Args:
        option: how the command line names a split, ``{}`` in it, for hints.
    """
    path = Path(spec.path).expanduser()
    if path.is_file() and path.suffix.lower() in (".txt", ".md", "") and spec.split is None:
        lines = read_text(path, name=spec.path).removesuffix("\n").split("\n")
        return Source(datasets.Dataset.from_dict({"text": lines}), spec.path)
    try:
        rows = open_source(spec)
    except UserError as error:
        if likely := re.search(r"dataset\.split=([^\s)]+)", error.hint):
            raise UserError(error.message, f"Name it: {option.format(likely[1])}.") from None
        raise
    if len(rows) == 0:
        raise UserError(f"{rows.label}: empty; there is no row in it.")
    return rows
