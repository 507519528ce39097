"""Keeps ``report.html`` up to date while a stage is trained, and counts the lengths of the stage's rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..io.atomic import sweep, write_json, write_text
from ..train.stage import Metrics, Observer, Outcome, Sample
from .report import REPORT, run_page
from .stage_record import LENGTHS, read_source, read_stage

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from ..data.dataset import TokenizedDataset
    from ..train.stage import Stage

SECONDS = 600.0  # between two reports at most
BINS = 32


class ReportWriter(Observer):
    """Writes the stage's ``report.html`` at the start, at every evaluation and every ten minutes, and at the end the run's.

    An error is printed once, and does not end training.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.failed = False
        self.due = 0.0

    def on_train_begin(self, stage: Stage, unit: str, total: int, step: int) -> None:
        self.folder = stage.dir.path
        self._try(lambda: write_lengths(stage))
        self._write()

    def on_step_end(self, step: int, metrics: Metrics) -> None:
        if time.monotonic() >= self.due:
            self._write()

    def on_evaluate(self, step: int, metrics: Metrics) -> None:
        self._write()

    def on_sample(self, step: int, samples: Sequence[Sample]) -> None:
        self._write()

    def on_train_end(self, stage: Stage, outcome: Outcome) -> None:
        self._write()
        run = stage.dir.run

        def write() -> None:
            sweep(run, REPORT)  # the run's lock is held
            write_text(run / REPORT, run_page(read_source(run)))

        if self._try(write):
            logger.info(f"report: {run / REPORT}")

    def _write(self) -> None:
        folder = self.folder
        if folder is not None:
            self._try(lambda: write_text(folder / REPORT, run_page([read_stage(folder)])))
            self.due = time.monotonic() + SECONDS

    def _try(self, work: Callable[[], object]) -> bool:
        try:
            work()
        except Exception as error:  # a report must not end a night of training
            if not self.failed:
                self.failed = True
                why = str(error) or type(error).__name__
                logger.warning(f"the report could not be written; training continues without it: {why}")
            return False
        return True


def write_lengths(stage: Stage) -> None:
    """Write ``lengths.json`` into a stage's folder: histograms of the rows' lengths, which no other file has."""
    told: dict[str, Any] = {"format": 1, "unit": "conversation" if stage.method == "sft" else "pair"}
    for part, data in (("training", stage.data), ("held-out", stage.eval_data)):
        if data is not None:
            told[part] = length_histograms(data)
    write_json(stage.dir.path / LENGTHS, told)


def length_histograms(data: TokenizedDataset) -> dict[str, Any]:
    """Histograms of the examples' tokens and of their supervised tokens.

    Returns:
        ``length`` and ``supervised``: ``edges`` [BINS + 1], ``whole`` and ``cut`` [BINS] (counts of complete examples and
        of those cut to ``max_length``), ``mean``, ``median``, ``p95``, ``longest``.
    """
    table = data.examples.columns("supervised", "cut")[:]
    was_cut = table.column("cut").to_numpy() > 0
    found = {}
    for name, values in (("length", np.asarray(data.lengths)), ("supervised", table.column("supervised").to_numpy())):
        edges = np.linspace(0, max(int(values.max()), BINS), BINS + 1)
        found[name] = {
            "edges": [round(float(edge), 2) for edge in edges],
            "whole": np.histogram(values[~was_cut], edges)[0].tolist(),
            "cut": np.histogram(values[was_cut], edges)[0].tolist(),
            "mean": round(float(values.mean()), 1),
            "median": float(np.median(values)),
            "p95": round(float(np.quantile(values, 0.95)), 1),
            "longest": int(values.max()),
        }
    return found
