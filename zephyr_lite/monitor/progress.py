"""A stage's metrics while it is trained, as the panel and the health check read them."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from ..train.stage import Sample, Stage
from .stage_record import json_lines

RECENT = 20  # steps of a recent mean
FIRST = 10  # first steps that it is compared with


class Progress:
    """Metrics of a stage so far, those logged by earlier processes of the run included.

    Attributes:
        stage: the stage; unit: "tokens" or "pairs"; total: number of steps; step: steps done.
        last: the last step's metrics.
        evaluations: all evaluations, with ``step``.
        sample: the last sample, or None.
        losses, margins: one value a step.
        first, recent: losses of the first steps, and metrics of the last ones.
        start: the loss of step 1, if it was logged.
        at_100: the mean loss of the ``RECENT`` steps up to step 100.
        lock: to be held while several of these are read.
    """

    def __init__(self, stage: Stage, unit: str, total: int, step: int) -> None:
        self.stage, self.unit, self.total, self.step = stage, unit, total, step
        self.lock = threading.Lock()
        self.last: Mapping[str, float] = {}
        self.evaluations: list[Mapping[str, Any]] = []
        self.sample: Sample | None = None
        self.losses: list[float] = []
        self.margins: list[float] = []
        self.first: list[float] = []
        self.recent: deque[Mapping[str, float]] = deque(maxlen=RECENT)
        self.start: float | None = None
        self.at_100: float | None = None
        self.begun = time.monotonic()
        self._stepped_at: float | None = None
        self._evaluation_seconds: deque[float] = deque(maxlen=5)
        for record in json_lines(stage.dir.metrics) if step else []:
            if not isinstance(record.get("step"), int) or record["step"] > step:
                continue
            if "eval_loss" in record:
                self.evaluations.append(record)
            elif "loss" in record:
                self._add(record["step"], record)

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a step."""
        with self.lock:
            self.step = step
            self._stepped_at = time.monotonic()
            self._add(step, dict(metrics))

    def _add(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.last = metrics
        loss = metrics.get("loss")
        if not isinstance(loss, float):  # "nan" in metrics.jsonl
            return
        self.recent.append(metrics)
        self.losses.append(loss)
        if step == 1:
            self.start = loss
        if len(self.first) < FIRST and step <= 2 * FIRST:
            self.first.append(loss)
        if step == 100:
            self.at_100 = self.mean("loss")
        if (margin := metrics.get("rewards/margins")) is not None:
            self.margins.append(float(margin))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add an evaluation."""
        with self.lock:
            self.evaluations.append({"step": step, **metrics})
            if self._stepped_at is not None:
                self._evaluation_seconds.append(time.monotonic() - self._stepped_at)

    def sampled(self, samples: Sequence[Sample]) -> None:
        """Keep the first of new samples."""
        with self.lock:
            self.sample = samples[0]

    def mean(self, name: str) -> float | None:
        """Mean over the recent steps; None if no step has the metric or a value is not finite."""
        values = [float(m[name]) for m in self.recent if name in m]
        found = sum(values) / len(values) if values else math.nan
        return found if math.isfinite(found) else None

    def seconds_left(self) -> float | None:
        """Seconds of the remaining steps and evaluations; None if unknown."""
        steps = self.total - self.step
        pace = self.mean("seconds")
        if pace is None or steps <= 0:
            return None
        every = self.stage.config.eval_steps
        cost = sum(self._evaluation_seconds) / len(self._evaluation_seconds) if self._evaluation_seconds else 0.0
        evaluations = self.total // every - self.step // every + bool(self.total % every) if every else 1
        return pace * steps + cost * evaluations
