"""Prompts of a data set: conversations, pairs, instructions, or a text file with one prompt a line."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..config.load import DatasetSpec
from ..data.formats import RowError, as_messages
from ..data.load import kind_of, stem_of, summarise
from ..errors import UserError
from ..io.text import read_text
from .questions import open_rows

# columns that may hold a prompt, in this order; "data" is raw UltraChat's, "turns" MT-Bench's
COLUMNS = ("prompt", "instruction", "messages", "conversations", "data", "question", "turns", "text")
_CONVERSATIONS = ("messages", "conversations", "data", "turns")
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
    id: str  # SHA-256 of the text, in hex
    where: str  # "prompts.jsonl row 17", counted from 1
    source: str  # the row's ``source`` column, or the name of the set
    correct: list[str]  # reference answers that UltraFeedback's rows have for some questions
    incorrect: list[str]


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

    Raises:
        UserError: there is no such set, no column holds prompts, or no row can be used.
    """
    rows: Any
    path, columns = Path(spec.path).expanduser(), list[str]()
    if path.is_file() and path.suffix.lower() == ".txt":
        if spec.split or spec.column:
            raise UserError(f"{spec.path}: a text file has no split and no column.", "Leave them out.")
        lines = enumerate(read_text(path).split("\n"), 1)
        rows = [{"text": line, "where": f"{spec.path} line {number}"} for number, line in lines if line.strip()]
        label, column = spec.path, "text"
    else:
        source = open_rows(DatasetSpec(**spec.model_dump(exclude={"limit", "column"})), "--split {}")
        label, columns = source.label, source.columns
        column = _column(spec, columns, label)
        rows = source.select_columns([column, *_BESIDE])  # the rest may be large
    numbers = np.arange(len(rows))
    if spec.limit is not None and spec.limit < len(rows):
        numbers = np.sort(np.random.default_rng([seed, 0]).permutation(len(rows))[: spec.limit])
    found = Prompts(label, read=len(numbers))
    seen: set[str] = set()
    for number in numbers.tolist():
        row = rows[number]
        where = row.get("where") or f"{label} row {number + 1}"
        try:
            text = _prompt_of(row, column)
            identity = hashlib.sha256(text.encode("utf-8")).hexdigest()
            if identity in seen:
                raise RowError("the prompt of an earlier row")
        except RowError as error:
            found.dropped.setdefault(str(error), []).append(where)
            continue
        seen.add(identity)
        own = row.get("source")
        answers = [_answers(row, name) for name in ("correct_answers", "incorrect_answers")]
        named = own if isinstance(own, str) and own else _name(label)
        found.prompts.append(Prompt(text, identity, where, named, *answers))
    if not found.prompts:
        hint = f"Another column may hold them: --column NAME, one of {', '.join(columns)}." if columns else ""
        raise UserError(f"{label}: no prompt in {found.read:,} rows: {summarise(found.dropped) or 'empty'}.", hint)
    return found


def _column(spec: PromptsSpec, columns: list[str], label: str) -> str:
    column = spec.column or next((name for name in COLUMNS if name in columns), None)
    if column is None:
        raise UserError(
            f"{label}: no column holds prompts (found {', '.join(columns)}; looked for {', '.join(COLUMNS)}).",
            "Name it: --column NAME.",
        )
    if column not in columns:
        raise UserError(f"{label}: there is no column {column!r}.", f"There are {', '.join(columns)}.")
    return column


def _prompt_of(row: Mapping[str, Any], column: str) -> str:
    """Raises RowError."""
    value = row.get(column)
    if isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        value = value[0]  # raw UltraChat, MT-Bench: turns without roles
    elif isinstance(value, (list, Mapping)) or (isinstance(value, str) and value.lstrip()[:2] == "[{"):
        try:
            value = next((m["content"] for m in as_messages(value, column) if m["role"] == "user"), "")
        except RowError:
            if not isinstance(value, str) or column in _CONVERSATIONS:
                raise
            # else a prompt that begins like JSON
    if value is not None and not isinstance(value, str):
        raise RowError(f"{column} is not text")
    if not value or not value.strip():
        raise RowError("an empty prompt")
    extra = row.get("input") if column == "instruction" else None
    if isinstance(extra, str) and extra.strip():
        value = f"{value}\n\n{extra}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError("text that is not valid Unicode") from None
    return value.strip()


def _answers(row: Mapping[str, Any], column: str) -> list[str]:
    value = row.get(column)
    return value if isinstance(value, list) and value and all(isinstance(v, str) for v in value) else ["None"]


def _name(label: str) -> str:
    """``ultrachat`` of ``data/ultrachat.jsonl``; a folder's split stays: ``ultrachat_200k/train_sft``."""
    path = Path(label)
    if path.suffix == ".txt" or kind_of(path):
        path = path.with_name(stem_of(path))
    return "/".join(path.parts[-2:]) if path.name.startswith(("train", "test")) else path.name
