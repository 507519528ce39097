"""Which way a stage's progress is shown."""

from __future__ import annotations

from types import TracebackType

from ..console import Console, Metrics
from ..train.observer import Observer


class Screen(Observer):
    """Lines, as the console prints them."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def say(self, text: str = "") -> None:
        self.console.say(text)

    def metrics(self, step: int, total: int, metrics: Metrics) -> None:
        self.console.metrics(step, total, metrics)


def open_screen(console: Console, *, quiet: bool = False, as_json: bool = False) -> Screen:
    """The screen for where the console writes to."""
    return Screen(console)
