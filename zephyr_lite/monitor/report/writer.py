"""Keeps a run's report up to date while a stage is trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...io.atomic import sweep, write_text
from ...train.objective import Metrics, Outcome
from ...train.observer import Observer, Sample
from .lengths import write_lengths
from .page import run_page
from .read import REPORT, read_source, read_stage

if TYPE_CHECKING:
    from ...train.stage import Stage

# without an evaluation the report is as old as this at most
SECONDS = 600.0


class ReportWriter(Observer):
    """Writes ``report.html`` into the stage's folder when training begins, at every evaluation and every ten minutes, and
    at the end into the run's too, about all of its stages.

    It reads what the stage wrote, and changes nothing of it. Whatever goes wrong here is said once, and training goes on.
    """

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say = say
        self.folder: Path | None = None
        self.failed = False
        self.due = 0.0

    def begins(self, stage: Stage, unit: str, total: int, step: int) -> None:
        self.folder = stage.dir.path
        self._try(lambda: write_lengths(stage))
        self._write()

    def stepped(self, step: int, metrics: Metrics) -> None:
        if time.monotonic() >= self.due:
            self._write()

    def evaluated(self, step: int, metrics: Metrics) -> None:
        self._write()

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        self._write()

    def ends(self, stage: Stage, outcome: Outcome) -> None:
        self._write()
        run = stage.dir.run

        def write() -> None:
            sweep(run, REPORT)  # the run's lock is held
            write_text(run / REPORT, run_page(read_source(run)))

        if self._try(write):
            self.say(f"report: {run / REPORT}")

    def _write(self) -> None:
        folder = self.folder
        if folder is not None:
            self._try(lambda: write_text(folder / REPORT, run_page([read_stage(folder)])))
            self.due = time.monotonic() + SECONDS

    def _try(self, work: Callable[[], object]) -> bool:
        """Whether it was done. A fault of the report's may not end a night of training."""
        try:
            work()
        except Exception as error:
            if not self.failed:
                self.failed = True
                why = str(error) or type(error).__name__
                self.say(f"the report could not be written, and training goes on without it: {why}")
            return False
        return True
