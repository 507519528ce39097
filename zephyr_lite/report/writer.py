"""Keeps a stage's report up to date while it is trained."""

from __future__ import annotations

from collections.abc import Callable

from ..train.observer import Observer


class ReportWriter(Observer):
    """Writes ``report.html`` into the stage's folder at every evaluation and at the end."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say = say
