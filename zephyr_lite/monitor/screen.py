"""The base class of all ways to show a stage's progress."""

from __future__ import annotations

import logging

from ..train.stage import Observer
from .console import Console, Metrics


class Screen(Observer):
    """Plain lines. A context manager, so that subclasses can restore the terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Release the output; ``error`` ended the command."""

    def say(self, text: str = "") -> None:
        """Print a message."""
        self.console.say(text)

    def log(self, record: logging.LogRecord) -> None:
        """Print a message of the package's logger."""
        self.say(record.getMessage())

    def metrics(self, step: int, total: int, metrics: Metrics) -> None:
        """Print a logged step or an evaluation."""
        self.console.metrics(step, total, metrics)
