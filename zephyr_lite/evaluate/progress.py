"""A line now and then about how far an evaluation is."""

from __future__ import annotations

import time

from ..live import Say
from ..words import duration

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
