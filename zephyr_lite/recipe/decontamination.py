"""Decontamination: finding conversations that contain a part of an evaluation set.

A row is contaminated if one of its turns shares n words in a row (13 by default) with a text of an evaluation set; a text of
fewer words has to be a whole turn. Brown et al., "Language models are few-shot learners", appendix C.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..config.load import DatasetSpec
from ..data.formats import ROLES
from ..errors import UserError
from ..io.text import read_text
from .questions import open_rows
from .words import Words, members, ngrams, whole, words_of

NGRAM = 13
SHORTEST = 5  # words; a shorter text ("Yes.") is a label, or could be anywhere
_BATCH = 1000


@dataclass
class EvalSets:
    """Hashes of the texts that must not be trained on.

    Attributes:
        n: words of an n-gram.
        names, rows: the sets' names and numbers of rows.
        grams, texts: hash → index of the first set that has it: of n-grams, and of texts with fewer than n words.
    """

    n: int
    names: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    grams: dict[int, int] = field(default_factory=dict)
    texts: dict[int, int] = field(default_factory=dict)

    @cached_property
    def keys(self) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of n-grams and of texts, uint64, sorted."""
        return np.array(sorted(self.grams), np.uint64), np.array(sorted(self.texts), np.uint64)

    def find(self, words: Words) -> dict[int, tuple[str, str]]:
        """The contaminated texts: index → (the set's name, the shared words)."""
        found: dict[int, tuple[str, str]] = {}
        grams, texts = self.keys
        if len(grams):
            hashes, first = ngrams(words, self.n)
            for hit in members(hashes, grams).tolist():
                text = int(np.searchsorted(words.offsets, first[hit], side="right")) - 1
                if text not in found:
                    name = self.names[self.grams[int(hashes[hit])]]
                    found[text] = name, words.text(int(first[hit]), self.n)
        if len(texts):
            hashes = whole(words)
            for text in members(hashes, texts).tolist():
                start, end = words.offsets[text : text + 2].tolist()
                found.setdefault(text, (self.names[self.texts[int(hashes[text])]], words.text(start, end - start)))
        return found


def read_eval_sets(names: Sequence[str], n: int = NGRAM) -> EvalSets:
    """Read evaluation sets.

    Args:
        names: files (JSONL, JSON, CSV, Parquet, or text with one item a line), folders, or hub ids; ``NAME#SPLIT`` for one
            split. All texts of a row count, except assistants' turns.

    Raises:
        UserError: a set cannot be read, or has no text of five words.
    """
    sets = EvalSets(n)
    for number, name in enumerate(names):
        rows, found = 0, 0
        for batch in _batches(name):
            rows += len(batch)
            words = words_of([text for row in batch for text in _texts(row)])
            grams = ngrams(words, n)[0].tolist()
            lengths = np.diff(words.offsets)
            texts = whole(words)[(lengths >= SHORTEST) & (lengths < n)].tolist()
            found += len(grams) + len(texts)
            for hashes, known in ((grams, sets.grams), (texts, sets.texts)):
                for value in hashes:
                    known.setdefault(value, number)
        if not found:
            raise UserError(
                f"{name}: no text of {SHORTEST} words or more in its {rows:,} rows; nothing can be compared with it.",
                "Name a file with the questions.",
            )
        sets.names.append(name)
        sets.rows.append(rows)
    return sets


def _batches(name: str) -> Iterator[list[Any]]:
    path, _, split = name.partition("#")
    file = Path(path).expanduser()
    if file.is_file() and file.suffix.lower() in (".txt", ".md", ""):
        yield [line for line in read_text(file, name=name).splitlines() if line.strip()]
        return
    if not path:
        raise UserError(f"decontaminate {name!r}: names no set.", "Name a file or a hub id, with #SPLIT perhaps.")
    rows = open_rows(DatasetSpec(path=path, split=split or None), f"--decontaminate {path}#{{}}")
    for start in range(0, len(rows), _BATCH):
        yield [list(row.values()) for row in rows[start : start + _BATCH]]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        role = value.get("role") or value.get("from")
        if isinstance(role, str) and ROLES.get(role.lower()) == "assistant":
            return  # phrases such as "let me know if you have any questions" are in many answers
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)
