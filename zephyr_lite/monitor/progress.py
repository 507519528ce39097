"""What is known of a stage while it is trained: the numbers that the panel shows and the verdict reads."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from ..train.observer import Sample
from ..train.stage import Stage

# Steps that a recent mean is taken over, and those at the start that it is compared with.
RECENT = 20
FIRST = 10


class Trend:
    """A curve of any length in at most ``places`` means of equal width; adding costs the same however long it is.

    Attributes:
        width: values a mean is taken over.
    """

    def __init__(self, places: int = 64) -> None:
        self.places, self.width = places, 1
        self._sums: list[float] = []
        self._last = 0  # values in the last of them

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        if not self._sums or self._last == self.width:
            if len(self._sums) == self.places:  # two become one
                self._sums = [a + b for a, b in zip(self._sums[::2], self._sums[1::2])]
                self.width *= 2
                self._last = self.width
            self._sums.append(0.0)
            self._last = 0
        self._sums[-1] += value
        self._last += 1

    def means(self) -> list[float]:
        """From the first to the last."""
        if not self._sums:
            return []
        return [*(s / self.width for s in self._sums[:-1]), self._sums[-1] / self._last]


class Progress:
    """A stage's numbers so far.

    Attributes:
        stage: what is trained; unit: "tokens" or "pairs"; total: steps in all; step: steps done.
        last: the last step's metrics.
        evaluations: of the whole run, with ``step``.
        sample: the last one drawn, or None.
        losses, margins: the curves so far.
        first, recent: losses of the run's first steps, and metrics of its last ones.
        start: the loss of step 1, where this run's metrics have it.
        at_100: the mean loss of the ``RECENT`` steps up to step 100, once they were made.
        changes: grows with everything that is new.
        lock: held by whoever writes or reads several of these at once.
    """

    def __init__(self, stage: Stage, unit: str, total: int, step: int) -> None:
        self.stage, self.unit, self.total, self.step = stage, unit, total, step
        self.lock = threading.Lock()
        self.last: Mapping[str, float] = {}
        self.evaluations: list[Mapping[str, Any]] = []
        self.sample: Sample | None = None
        self.losses, self.margins = Trend(), Trend()
        self.first: list[float] = []
        self.recent: deque[Mapping[str, float]] = deque(maxlen=RECENT)
        self.start: float | None = None
        self.at_100: float | None = None
        self.changes = 0
        self.begun = time.monotonic()
        self._stepped_at: float | None = None
        self._evaluation_seconds: deque[float] = deque(maxlen=5)
        for record in _records(stage, step):
            number = int(record["step"])
            if "eval_loss" in record:
                self.evaluations.append(record)
            elif "loss" in record:
                self._add(number, record)

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done. Takes some microseconds."""
        with self.lock:
            self.step = step
            self._stepped_at = time.monotonic()
            self._add(step, dict(metrics))  # the loop's own may change

    def _add(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.last = metrics
        self.changes += 1
        loss = metrics.get("loss")
        if not isinstance(loss, float):  # "nan" of a file
            return
        self.recent.append(metrics)
        self.losses.add(loss)
        if step == 1:
            self.start = loss
        if len(self.first) < FIRST and step <= 2 * FIRST:
            self.first.append(loss)
        if step == 100:
            self.at_100 = self.mean("loss")
        if (margin := metrics.get("rewards/margins")) is not None:
            self.margins.add(float(margin))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.lock:
            self.evaluations.append({"step": step, **metrics})
            self.changes += 1
            if self._stepped_at is not None:
                self._evaluation_seconds.append(time.monotonic() - self._stepped_at)

    def sampled(self, samples: Sequence[Sample]) -> None:
        with self.lock:
            self.sample = samples[0]
            self.changes += 1

    def mean(self, name: str) -> float | None:
        """Over the last steps; None where none has it, or one of them is not finite."""
        values = [float(m[name]) for m in self.recent if name in m]
        found = sum(values) / len(values) if values else math.nan
        return found if math.isfinite(found) else None

    def seconds_left(self) -> float | None:
        """Of the steps and evaluations that are still to come; None: not known yet."""
        steps = self.total - self.step
        pace = self.mean("seconds")
        if pace is None or steps <= 0:
            return None
        every = self.stage.config.eval_steps
        cost = sum(self._evaluation_seconds) / len(self._evaluation_seconds) if self._evaluation_seconds else 0.0
        evaluations = self.total // every - self.step // every + bool(self.total % every) if every else 1
        return pace * steps + cost * evaluations


def _records(stage: Stage, step: int) -> list[dict[str, Any]]:
    """What was logged up to this step by the processes before; a torn line is passed over, as the loop does."""
    if step == 0 or not stage.dir.metrics.is_file():
        return []
    found = []
    for line in stage.dir.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if int(record["step"]) <= step:
                found.append(record)
        except (ValueError, KeyError, TypeError):
            continue
    return found
