"""Malformed rows, configurations and words, and what is said of each (``tests/malformed.py`` explains a case)."""

from __future__ import annotations

from pathlib import Path

from .malformed import Case, Fixtures, row, show


def rows_of(content: str | bytes, name: str = "rows.jsonl", **changes: object):
    """A data set of these bytes, shown as sft sees it."""

    def make(tmp: Path, fixtures: Fixtures) -> list[str]:
        (tmp / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return show(fixtures, dataset=name, **changes)

    return make


def words(*given: str):
    return lambda tmp, fixtures: list(given)


GOOD = row("a", "b")

CASES = [
    Case("an empty file", rows_of(""), "rows.jsonl: the file is empty."),
    Case(
        "an unknown key",
        words("sft", "learning_rat=1"),
        "the command line: there is no key 'learning_rat'. Did you mean 'learning_rate'?",
    ),
]
