"""Keeps ``report.html`` up to date while a stage is trained, and counts the lengths of the stage's rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..io.atomic import sweep, write_json, write_text
from ..train.stage import Metrics, Observer, Outcome, Sample
from .records import LENGTHS, read_source
from .report import REPORT, run_page

if TYPE_CHECKING:
    from ..train.stage import Stage

logger = logging.getLogger(__name__)
SECONDS = 600.0  # between two reports at most
BINS = 32


class ReportWriter(Observer):
    """Writes the stage's ``report.html`` at the start, at every evaluation and every ten minutes, and at the end the run's.

    An error is logged once, and does not end training.
    """

    folder = Path()  # the stage's
    failed = False
    due = 0.0  # when the next report is written at the latest (time.monotonic())

    def on_train_begin(self, stage: Stage, unit: str, total: int, step: int) -> None:
        """Write the report, and ``lengths.json``: histograms of the rows' lengths, which no other file has.

        For training and held-out rows, and for their tokens (``length``) and supervised tokens (``supervised``): ``edges``
        [BINS + 1], ``whole`` and ``cut`` [BINS] (counts of complete examples and of those cut to ``max_length``), ``mean``,
        ``median``, ``p95``, ``longest``.
        """
        told: dict[str, Any] = {"format": 1, "unit": stage.data.report.unit}
        for part, data in (("training", stage.data), ("held-out", stage.eval_data)):
            if data is None:
                continue
            table = data.examples.columns("supervised", "cut")[:]
            was_cut, supervised = table.column("cut").to_numpy() > 0, table.column("supervised").to_numpy()
            told[part] = {}
            for name, values in (("length", np.asarray(data.lengths)), ("supervised", supervised)):
                edges = np.linspace(0, max(int(values.max()), BINS), BINS + 1)
                told[part][name] = {
                    "edges": edges.round(2).tolist(),
                    "whole": np.histogram(values[~was_cut], edges)[0].tolist(),
                    "cut": np.histogram(values[was_cut], edges)[0].tolist(),
                    "mean": round(float(values.mean()), 1),
                    "median": float(np.median(values)),
                    "p95": round(float(np.quantile(values, 0.95)), 1),
                    "longest": int(values.max()),
                }
        self.folder = stage.dir.path
        write_json(self.folder / LENGTHS, told)
        self.write(self.folder)

    def on_step_end(self, step: int, metrics: Metrics) -> None:
        if time.monotonic() >= self.due:
            self.write(self.folder)

    def on_evaluate(self, step: int, metrics: Metrics) -> None:
        self.write(self.folder)

    def on_sample(self, step: int, samples: Sequence[Sample]) -> None:
        self.write(self.folder)

    def on_train_end(self, stage: Stage, outcome: Outcome) -> None:
        self.write(self.folder)
        sweep(stage.dir.run, REPORT)  # temporary files of killed processes; the run's lock is held
        self.write(stage.dir.run)
        if not self.failed:
            logger.info("report: %s", stage.dir.run / REPORT)

    def write(self, folder: Path) -> None:
        """Write the report of a stage's or a run's folder."""
        self.due = time.monotonic() + SECONDS
        try:
            write_text(folder / REPORT, run_page(read_source(folder)))
        except Exception as error:  # a report must not end a night of training
            if not self.failed:
                logger.warning("the report could not be written; training continues without it: %s", error)
            self.failed = True
