"""Raw conversations: UltraChat as on the hub (train_0.jsonl … train_9.jsonl), or any set of conversations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np

from ..config.load import DatasetSpec
from ..data.formats import COLUMNS, PLAIN, RowError, detect, normalise
from ..data.load import Source, kind_of, stem_of
from ..errors import UserError
from ..io.text import shown
from .questions import open_rows

# raw UltraChat is one set in ten files, which the hub's layout would call ten splits
_NUMBERED = re.compile(r"train_(\d+)$")


@dataclass(frozen=True)
class Raw:
    """The raw rows of all files, one after the other.

    Attributes:
        rows: with the columns that are read.
        kind: their format.
        labels: of the files; ends: int64, where each ends in ``rows``.
    """

    rows: Source
    kind: str
    labels: list[str]
    ends: np.ndarray = field(repr=False)

    def place(self, index: int) -> str:
        """``train_3.jsonl row 17``, counted from 1."""
        part = int(np.searchsorted(self.ends, index, side="right"))
        return f"{self.labels[part]} row {index - (int(self.ends[part - 1]) if part else 0) + 1}"


@dataclass
class Dialogue:
    """The turns of one row up to its last answer.

    Attributes:
        fault: why the row is dropped, or "".
        detail: of the fault or the cut.
        refusal: the rule by which it was cut, or "".
    """

    roles: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    fault: str = ""
    detail: str = ""
    refusal: str = ""

    @property
    def prompt(self) -> str:
        """The first user turn."""
        return self.texts[self.roles.index("user")]


def open_raw(path: str, split: str | None = None) -> Raw:
    """Open raw conversations: a file, a folder, or a hub id.

    A folder with train_0.jsonl … train_9.jsonl is read whole, in numeric order, unless ``split`` names one of them.

    Raises:
        UserError: there is nothing, it cannot be read, is empty, or has no conversations.
    """
    specs = [DatasetSpec(path=path, split=split)]
    folder = Path(path).expanduser()
    if split is None and folder.is_dir():
        numbered = {
            int(found[1]): file
            for file in folder.iterdir()
            if kind_of(file) and (found := _NUMBERED.match(stem_of(file)))
        }
        specs = [DatasetSpec(path=str(numbered[number])) for number in sorted(numbered)] or specs
    parts, labels, kinds = [], [], []
    for spec in specs:
        part = open_rows(spec, "--split {}")
        label = part.label
        try:
            kinds.append(detect(part.columns, "sft", label))
        except UserError as error:
            raise UserError(error.message, "If the columns have other names, rename them in the file.") from None
        if kinds[-1] == PLAIN:
            raise UserError(f"{label}: found columns {shown(', '.join(part.columns), 500)}, and no conversations.")
        parts.append(part.select_columns(COLUMNS))
        labels.append(label)
    try:
        if len(set(kinds)) > 1:
            raise ValueError("they are of different kinds")
        rows = datasets.concatenate_datasets([part.table for part in parts])
    except ValueError as error:
        columns = "; ".join(f"{label}: {', '.join(part.columns)}" for label, part in zip(labels, parts))
        raise UserError(
            f"{path}: its files do not fit together: {error}",
            f"Columns are {columns}. Clean one at a time: --split train_0",
        ) from None
    return Raw(Source(rows, path), kinds[0], labels, np.cumsum([len(part) for part in parts]))


def dialogues(rows: Source, indices: slice | Sequence[int]) -> list[Dialogue]:
    """Some rows as dialogues; a row that cannot be read has a fault."""
    found = []
    for values in rows[indices]:
        try:
            messages = normalise(values, "sft").value["messages"]
            if any(set(message) > {"role", "content"} or message["role"] == "tool" for message in messages):
                raise RowError("tool calls, reasoning or turns that are not to be trained, which are not cleaned")
            roles = [message["role"] for message in messages]
            if "user" not in roles[:2]:
                raise RowError("does not begin with the user" if "user" in roles else "the user says nothing")
            found.append(Dialogue(roles, [message["content"] for message in messages]))
        except RowError as error:
            found.append(Dialogue(fault=str(error)))
    return found
