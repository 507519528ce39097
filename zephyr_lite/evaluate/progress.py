"""Models one after the other on the same rows, with a line now and then about how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..data.dataset import TokenizedDataset
from ..io.words import duration
from ..model.loaded import LoadedModel, Say
from .plain import scorer

T = TypeVar("T")

EVERY = 15.0  # seconds


class Progress:
    """Called with the number of rows that are done.

    Args:
        name: of the model.
        total: rows in all.
        unit: what they are.
    """

    def __init__(self, name: str, total: int, unit: str, say: Say) -> None:
        self.name, self.total, self.unit, self.say = name, total, unit, say
        self.start = self.told = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.told < EVERY or done >= self.total:
            return
        self.told = now
        left = (now - self.start) / done * (self.total - done)
        self.say(f"{self.name}: {done:,} of {self.total:,} {self.unit}, {duration(left)} left")


def score_each(
    live: LoadedModel,
    names: Sequence[str],
    data: TokenizedDataset,
    unit: str,
    score: Callable[[Any, TokenizedDataset, Progress], T],
    say: Say,
) -> dict[str, T]:
    """model → what ``score`` finds of it; Ctrl-C ends after those that are done.

    Args:
        unit: what the rows are.
        score: of a model's scorer, the rows, and whom to tell how many are done.

    Raises:
        KeyboardInterrupt: before the first was done.
    """
    found: dict[str, T] = {}
    try:
        for name in names:
            found[name] = score(scorer(live, name), data, Progress(name, len(data.lengths), unit, say))
    except KeyboardInterrupt:
        if not found:
            raise
    return found
