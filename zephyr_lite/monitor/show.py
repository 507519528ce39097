"""Which way a stage's progress is shown: a panel, lines, fewer lines, almost nothing, or JSON."""

from __future__ import annotations

import os
import re
from types import TracebackType

from ..cli.console import Console, Metrics
from ..train.objective import Outcome
from ..train.observer import Observer
from ..train.stage import Stage

# Variables of processes that a notebook's kernel started: Jupyter's own, Colab's, Kaggle's. `!command` gives them a
# terminal there, but what it prints is only appended to the cell: a cursor that moves up would flood it.
NOTEBOOKS = ("JPY_PARENT_PID", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")
# Steps shown of a whole run where a cell keeps every line.
NOTEBOOK_LINES = 50
# Words that a line has which somebody should read who asked for nothing else. What is said has no degree of its own.
_WARNS = re.compile(
    r"left out|cannot|could not|fail|missing|damaged|changed since|instead|too large|does not|warning|not finite|collapse",
    re.IGNORECASE,
)


class Screen(Observer):
    """Lines, as the console prints them. As a context it gives the terminal back, whatever happened inside."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def say(self, text: str = "") -> None:
        """A line that is no step's."""
        self.console.say(text)

    def metrics(self, step: int, total: int, metrics: Metrics) -> None:
        """A logged step, or an evaluation."""
        self.console.metrics(step, total, metrics)


class NotebookScreen(Screen):
    """Lines of some steps only: the first, the last, about ``NOTEBOOK_LINES`` between them, and every evaluation."""

    def metrics(self, step: int, total: int, metrics: Metrics) -> None:
        evaluation = any(name.startswith("eval_") for name in metrics)
        if evaluation or step in (1, total) or step % max(1, -(-total // NOTEBOOK_LINES)) == 0:
            self.console.metrics(step, total, metrics)


class QuietScreen(Screen):
    """Nothing of the steps. What is said before them only where it warns; what is said during and after them always.

    Where no training began (the stage is complete; ``--dry-run``) what was said is the result.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._before: list[str] = []
        self._begun = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._begun and error is None:
            for text in self._before:
                self.console.say(text)

    def begins(self, stage: Stage, unit: str, total: int, step: int) -> None:
        self._begun = True

    def say(self, text: str = "") -> None:
        if self._begun or _WARNS.search(text):
            self.console.say(text)
        else:
            self._before.append(text)

    def metrics(self, step: int, total: int, metrics: Metrics) -> None:
        return None

    def ends(self, stage: Stage, outcome: Outcome) -> None:
        from .words import end_line

        self.console.say(end_line(stage, outcome))


def open_screen(console: Console, *, quiet: bool = False, as_json: bool = False) -> Screen:
    """The screen for where the console writes to.

    Args:
        quiet: nothing of the steps.
        as_json: one JSON object a line (with ``quiet`` none of steps).
    """
    if as_json:
        from .json_lines import JsonScreen

        return JsonScreen(console, quiet=quiet)
    if quiet:
        return QuietScreen(console)
    out = console.out
    # rich also takes a pipe for a terminal where FORCE_COLOR is set
    terminal = out.is_terminal and not out.is_dumb_terminal and out.file.isatty()
    if console.notebook or (terminal and any(name in os.environ for name in NOTEBOOKS)):
        return NotebookScreen(console)
    if terminal and not out.legacy_windows:
        from .live import LiveScreen

        return LiveScreen(console)
    return Screen(console)
