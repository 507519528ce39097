"""Prompts of a data set: conversations, pairs, instructions, or a text file with one prompt a line."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...config.load import DatasetSpec
from ...data.formats import RowError, as_messages
from ...data.load import Source, kind_of, stem_of, summarise
from ...errors import UserError
from ...io.text import read_text
from ..questions import open_rows
from .config import PromptsSpec

# columns that may hold a prompt, in this order; "data" is raw UltraChat's, "turns" MT-Bench's
COLUMNS = ("prompt", "instruction", "messages", "conversations", "data", "question", "turns", "text")
_CONVERSATIONS = ("messages", "conversations", "data", "turns")
_BESIDE = ("input", "source", "correct_answers", "incorrect_answers")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: SHA-256 of the text, in hex.
        where: "prompts.jsonl row 17", counted from 1.
        source: the row's ``source`` column, or the name of the set.
        correct, incorrect: reference answers that UltraFeedback's rows have for some questions.
    """

    text: str
    id: str
    where: str
    source: str
    correct: tuple[str, ...] = ("None",)
    incorrect: tuple[str, ...] = ("None",)


@dataclass
class Prompts:
    """The prompts of a set. ``read``: number of rows; ``dropped``: reason → the places of the rows that were left out."""

    prompts: list[Prompt]
    label: str
    read: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def note(self) -> str:
        left = f"; left out: {summarise(self.dropped)}" if self.dropped else ""
        return f"{self.label}: {self.read:,} rows, {len(self.prompts):,} prompts{left}"


def read_prompts(spec: PromptsSpec, *, seed: int) -> Prompts:
    """The prompts of a set, in its order, without repetitions.

    The prompt of a conversation is its first user turn. An ``input`` beside an ``instruction`` is appended, as in Alpaca.

    Args:
        seed: of the draw of ``spec.limit`` rows.

    Raises:
        UserError: there is no such set, no column holds prompts, or no row can be used.
    """
    if Path(spec.path).expanduser().is_file() and Path(spec.path).suffix.lower() == ".txt":
        rows: Source | list[dict[str, Any]] = _text_lines(spec)
        label, column, columns = spec.path, "text", list[str]()
    else:
        dataset = DatasetSpec(path=spec.path, name=spec.name, split=spec.split, revision=spec.revision)
        source = open_rows(dataset, "--split {}")
        label, columns = source.label, source.columns
        column = _column(spec, columns, label)
        rows = source.select_columns([column, *_BESIDE])  # the rest may be large
    numbers = np.arange(len(rows))
    if spec.limit is not None and spec.limit < len(rows):
        numbers = np.sort(np.random.default_rng([seed, 0]).permutation(len(rows))[: spec.limit])
    found = Prompts([], label)
    first: set[str] = set()
    for number in numbers.tolist():
        row = rows[number]
        where = row.get("where") or f"{label} row {number + 1}"
        found.read += 1
        try:
            text = _prompt_of(row, column)
        except RowError as error:
            found.dropped.setdefault(str(error), []).append(where)
            continue
        identity = hashlib.sha256(text.encode("utf-8")).hexdigest()
        if identity in first:
            found.dropped.setdefault("the prompt of an earlier row", []).append(where)
            continue
        first.add(identity)
        named = row.get("source")
        found.prompts.append(
            Prompt(
                text,
                identity,
                where,
                named if isinstance(named, str) and named else _name(label),
                _answers(row, "correct_answers"),
                _answers(row, "incorrect_answers"),
            )
        )
    if not found.prompts:
        hint = f"Another column may hold them: --column NAME, one of {', '.join(columns)}." if columns else ""
        raise UserError(f"{label}: no prompt in {found.read:,} rows: {summarise(found.dropped) or 'empty'}.", hint)
    return found


def _column(spec: PromptsSpec, columns: list[str], label: str) -> str:
    if spec.column is not None:
        if spec.column not in columns:
            raise UserError(f"{label}: there is no column {spec.column!r}.", f"There are {', '.join(columns)}.")
        return spec.column
    column = next((name for name in COLUMNS if name in columns), None)
    if column is None:
        raise UserError(
            f"{label}: no column holds prompts (found {', '.join(columns)}; looked for {', '.join(COLUMNS)}).",
            "Say which one: --column NAME.",
        )
    return column


def _prompt_of(row: Mapping[str, Any], column: str) -> str:
    """Raises RowError."""
    value = row.get(column)
    if isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        text = value[0]  # raw UltraChat, MT-Bench: turns without roles
    elif isinstance(value, (list, Mapping)) or (isinstance(value, str) and value.lstrip()[:2] == "[{"):
        try:
            text = next((m["content"] for m in as_messages(value, column) if m["role"] == "user"), "")
        except RowError:
            if not isinstance(value, str) or column in _CONVERSATIONS:
                raise
            text = value  # a prompt that begins like JSON
    elif isinstance(value, str):
        text = value
    elif value is None:
        text = ""
    else:
        raise RowError(f"{column} is not text")
    if not text.strip():
        raise RowError("an empty prompt")
    extra = row.get("input") if column == "instruction" else None
    if isinstance(extra, str) and extra.strip():
        text = f"{text}\n\n{extra}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError("text that is not valid Unicode") from None
    return text.strip()


def _answers(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    value = row.get(column)
    known = isinstance(value, list) and value and all(isinstance(v, str) for v in value)
    return tuple(value) if known and value is not None else ("None",)


def _name(label: str) -> str:
    """``ultrachat`` of ``data/ultrachat.jsonl``; a folder's split stays: ``ultrachat_200k/train_sft``."""
    path = Path(label)
    if path.suffix == ".txt" or kind_of(path):
        path = path.with_name(stem_of(path))
    return "/".join(path.parts[-2:]) if path.name.startswith(("train", "test")) else path.name


def _text_lines(spec: PromptsSpec) -> list[dict[str, Any]]:
    path = Path(spec.path).expanduser()
    if spec.split or spec.column:
        raise UserError(f"{spec.path}: a text file has no split and no column.", "Leave them out.")
    text = read_text(path)
    return [
        {"text": line, "where": f"{spec.path} line {number}"}
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
