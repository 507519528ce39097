"""Opening the raw rows: UltraChat as it lies on the hub (train_0.jsonl … train_9.jsonl), or any set of conversations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np

from ...config.load import DatasetSpec
from ...data.formats import COLUMNS, PLAIN, detect, normalise
from ...data.messages import RowError
from ...data.opening import Source, kind_of, open_source, stem_of
from ...errors import UserError
from ...io.text import shown
from ..questions import split_said_as

# raw UltraChat is one set in ten files, which the hub's layout would call ten splits
_NUMBERED = re.compile(r"train_(\d+)$")


@dataclass(frozen=True)
class Raw:
    """The raw rows of all sources, one after the other.

    Attributes:
        rows: only the columns that are read.
        kind: what it was read as.
        labels: a name for each part, which stands before "row N" in messages.
        ends: int64 [parts]: where each part ends in ``rows``.
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
    """One row: its turns, or why it has none."""

    roles: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    fault: str = ""


def open_raw(path: str, split: str | None = None) -> Raw:
    """Open raw conversations: a file, a folder, or a hub id.

    A folder with train_0.jsonl … train_9.jsonl is taken whole, in the order of the numbers, unless ``split`` names one.

    Raises:
        UserError: nothing is there, it cannot be read, is empty, or holds no conversations.
    """
    specs = [DatasetSpec(path=path, split=split)]
    folder = Path(path).expanduser()
    if split is None and folder.is_dir():
        numbered = sorted(
            (
                (int(found[1]), file)
                for file in folder.iterdir()
                if kind_of(file) and (found := _NUMBERED.match(stem_of(file)))
            ),
        )
        if numbered:
            specs = [DatasetSpec(path=str(file)) for _, file in numbered]
    parts, labels, kinds = [], [], []
    for spec in specs:
        with split_said_as("--split {}"):
            part = open_source(spec)
        label = part.label
        if len(part) == 0:
            raise UserError(f"{label}: empty; there is no row in it.")
        try:
            kinds.append(detect(part.columns, "sft", label))
        except UserError as error:
            raise UserError(error.message, "If the columns have other names, rename them in the file.") from None
        if kinds[-1] == PLAIN:
            raise UserError(f"{label}: found columns {shown(', '.join(part.columns), 500)}, and no conversations.")
        parts.append(part.select_columns(COLUMNS))
        labels.append(label)
    try:
        if len(set(kinds)) > 1:  # one reader for all would leave out the others' rows
            raise ValueError("they are of different kinds")
        rows = datasets.concatenate_datasets([part.table for part in parts])
    except ValueError as error:
        what = "; ".join(f"{label}: {', '.join(part.columns)}" for label, part in zip(labels, parts))
        raise UserError(
            f"{path}: its files do not fit together: {error}",
            f"Columns are {what}. Clean one at a time: --split train_0",
        ) from None
    return Raw(Source(rows, path), kinds[0], labels, np.cumsum([len(part) for part in parts]))


def dialogues(rows: Source, indices: slice | Sequence[int]) -> list[Dialogue]:
    """Some rows, normalised: turns up to the last answer, or the fault for which the row is left out."""
    found = []
    for values in rows[indices]:
        dialogue = Dialogue()
        try:
            messages = normalise(values, "sft").value["messages"]
            if any(set(message) > {"role", "content"} or message["role"] == "tool" for message in messages):
                raise RowError("tool calls, reasoning or turns that are not to be trained, which are not cleaned")
            dialogue.roles = [message["role"] for message in messages]
            dialogue.texts = [message["content"] for message in messages]
            first = dialogue.roles.index("user") if "user" in dialogue.roles else -1
            if first < 0 or first > 1:
                raise RowError("the user says nothing" if first < 0 else "does not begin with the user")
        except RowError as error:
            dialogue = Dialogue(fault=str(error))
        found.append(dialogue)
    return found
