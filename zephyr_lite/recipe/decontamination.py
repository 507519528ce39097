"""Decontamination: finding conversations that contain a part of an evaluation set.

A row is contaminated if one of its turns shares n words in a row (13 by default) with a text of an evaluation set; a text of
fewer words has to be a whole turn. Brown et al., "Language models are few-shot learners", appendix C.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config.load import DatasetSpec
from ..data.messages import ROLES
from ..data.opening import open_source
from ..errors import UserError
from .questions import split_said_as
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
        grams: uint64, sorted: the n-grams; texts: of the texts with fewer than n words.
        grams_of, texts_of: int32, the first set that has each.
    """

    n: int
    names: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    grams: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    grams_of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    texts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    texts_of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def find(self, words: Words) -> dict[int, tuple[str, str]]:
        """The contaminated texts: index → (the set's name, the shared words)."""
        found: dict[int, tuple[str, str]] = {}
        if len(self.grams):
            hashes, first = ngrams(words, self.n)
            for hit in members(hashes, self.grams).tolist():
                text = int(np.searchsorted(words.offsets, first[hit], side="right")) - 1
                if text not in found:
                    name = self.names[self.grams_of[np.searchsorted(self.grams, hashes[hit])]]
                    found[text] = (name, words.text(int(first[hit]), self.n))
        if len(self.texts):
            hashes = whole(words)
            for text in members(hashes, self.texts).tolist():
                first_word, count = int(words.offsets[text]), int(words.offsets[text + 1] - words.offsets[text])
                name = self.names[self.texts_of[np.searchsorted(self.texts, hashes[text])]]
                found.setdefault(text, (name, words.text(first_word, count)))
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
    grams: list[np.ndarray] = []
    texts: list[np.ndarray] = []
    for name in names:
        rows, of_n, short = 0, 0, 0
        for batch in _batches(name):
            rows += len(batch)
            words = words_of([text for row in batch for text in _texts(row)])
            hashes, _ = ngrams(words, n)
            lengths = np.diff(words.offsets)
            brief = whole(words)[(lengths >= SHORTEST) & (lengths < n)]
            grams.append(_with_set(hashes, len(sets.names)))
            texts.append(_with_set(brief, len(sets.names)))
            of_n, short = of_n + len(hashes), short + len(brief)
        if not of_n + short:
            raise UserError(
                f"{name}: no text of {SHORTEST} words or more in its {rows:,} rows; nothing can be compared with it.",
                "Name a file with the questions.",
            )
        sets.names.append(name)
        sets.rows.append(rows)
    sets.grams, sets.grams_of = _sorted(grams)
    sets.texts, sets.texts_of = _sorted(texts)
    return sets


def _with_set(hashes: np.ndarray, number: int) -> np.ndarray:
    return np.stack((hashes, np.full(len(hashes), number, np.uint64)))


def _sorted(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    if not parts:
        return np.zeros(0, np.uint64), np.zeros(0, np.int32)
    both = np.concatenate(parts, axis=1)
    keys, first = np.unique(both[0], return_index=True)
    return keys, both[1][first].astype(np.int32)


def _batches(name: str) -> Iterator[list[Any]]:
    path, _, split = name.partition("#")
    file = Path(path).expanduser()
    if file.is_file() and file.suffix.lower() in (".txt", ".md", ""):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{name}: not UTF-8.", "Save the file as UTF-8.") from None
        yield [line for line in lines if line.strip()]
        return
    if not path:
        raise UserError(f"decontaminate {name!r}: names no set.", "Name a file or a hub id, with #SPLIT perhaps.")
    with split_said_as(f"--decontaminate {path}#{{}}"):
        rows = open_source(DatasetSpec(path=path, split=split or None))
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
