"""How a stage's progress is shown: lines, fewer lines, warnings only, JSON, or a live panel (``panel.py``)."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, redirect_stdout, suppress
from typing import Any

from rich.text import Text

from ..errors import Interrupted, UserError
from ..io.redact import redact
from ..io.text import counted, duration
from ..train.distributed import PeerEnded
from ..train.stage import Observer, Outcome, Sample, Stage
from .console import Console, Metrics, is_evaluation, metrics_line

# Set by the kernels of Jupyter, Colab and Kaggle. `!command` gives its process a terminal there, but the cell only
# appends: cursor movements would flood it.
NOTEBOOKS = ("JPY_PARENT_PID", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")
NOTEBOOK_LINES = 50  # steps printed of a whole run in a notebook


class Screen(Observer, AbstractContextManager["Screen"]):
    """Plain lines. A context manager, so that subclasses can restore the terminal.

    Args:
        most: about how many steps of a whole run are printed; None: every logged one.
    """

    def __init__(self, console: Console, most: int | None = None) -> None:
        self.console, self.most = console, most

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Release the output; ``error`` ended the command."""

    def log(self, record: logging.LogRecord) -> None:
        """Print a message of the package's logger."""
        self.console.log(record)

    def on_train_begin(self, stage: Stage, unit: str, total: int, step: int) -> None:
        self.total = total
        self._seconds: deque[float] = deque(maxlen=20)  # of the last logged steps

    def on_log(self, step: int, metrics: Metrics) -> None:
        """Print a logged step or an evaluation."""
        left = self.seconds_left(step, metrics)
        every = 1 if self.most is None else max(1, -(-self.total // self.most))
        if is_evaluation(metrics) or step in (1, self.total) or step % every == 0:
            line = metrics_line(step, self.total, metrics, left if step < self.total else None)
            self.console.out.print(Text(line, style="bold" if is_evaluation(metrics) else ""))

    def seconds_left(self, step: int, metrics: Metrics) -> float | None:
        """Seconds of the remaining steps at the speed of the last ones, ``step`` included; None if unknown."""
        if "seconds" in metrics and not is_evaluation(metrics):
            self._seconds.append(metrics["seconds"])
        return sum(self._seconds) / len(self._seconds) * (self.total - step) if self._seconds else None


class QuietScreen(Screen):
    """No steps; of the messages before training only warnings, and ``RESULT``s; the result."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._began = False

    def log(self, record: logging.LogRecord) -> None:
        if self._began or record.levelno >= logging.WARNING or hasattr(record, "result"):
            self.console.log(record)

    def on_log(self, step: int, metrics: Metrics) -> None:
        """Print nothing."""

    def on_train_begin(self, stage: Stage, unit: str, total: int, step: int) -> None:
        self._began = True

    def on_train_end(self, stage: Stage, outcome: Outcome) -> None:
        """Print the adapter, the time and the held-out metrics in one line."""
        text = f"{stage.dir.adapter}: {counted(outcome.step, 'step')}, {duration(outcome.seconds)}"
        last = outcome.evaluations[-1] if outcome.evaluations else {}
        for name, key in (
            ("held-out loss", "eval_loss"),
            ("held-out accuracy", "eval_rewards/accuracies"),
            ("margin", "eval_rewards/margins"),
        ):
            if key in last:
                text += f"; {name} {float(last[key]):.4f}"
        if outcome.best is not None and outcome.best[1] != outcome.step:
            text += f"; best held-out loss {outcome.best[0]:.4f} at step {outcome.best[1]:,}"
        if outcome.general_loss is not None:
            text += "; general text {before:.4f} before, {after:.4f} after".format(**outcome.general_loss)
        if outcome.skipped:
            text += f"; {outcome.skipped:,} steps left out"
        self.console.say(text)


class JsonScreen(Screen):
    """One JSON object a line on standard output; the events are listed in docs/watch.md. All other output goes to standard
    error.

    Args:
        quiet: no events of steps.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        super().__init__(console)
        self.quiet, self._redirected = quiet, redirect_stdout(sys.stderr)

    def __enter__(self) -> JsonScreen:
        self._out = self.console.out.file
        self._redirected.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._redirected.__exit__(None, None, None)
        if error is None or isinstance(error, SystemExit | BrokenPipeError):
            return
        # the exit code in a word; another process's error has that process's code
        code = error.code if isinstance(error, PeerEnded) else 2 if isinstance(error, UserError) else 1
        if code == 130 or isinstance(error, Interrupted | KeyboardInterrupt):
            word = "interrupted"
        else:
            word = "user" if code == 2 else "failed"
        message = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        with suppress(OSError):
            self._emit("error", kind=word, message=message, hint=getattr(error, "hint", "") or "")

    def log(self, record: logging.LogRecord) -> None:
        self._emit("say", level=record.levelname.lower(), text=record.getMessage())

    def on_log(self, step: int, metrics: Metrics) -> None:
        if is_evaluation(metrics):
            self._emit("eval", step=step, total=self.total, **metrics)
        elif not self.quiet:
            self._emit("step", step=step, total=self.total, seconds_left=self.seconds_left(step, metrics), **metrics)

    def on_train_begin(self, stage: Stage, unit: str, total: int, step: int) -> None:
        super().on_train_begin(stage, unit, total, step)
        self._emit(
            "begin",
            stage=stage.config.stage,
            method=stage.method,
            folder=str(stage.dir.path),
            step=step,
            total=total,
            unit=unit,
            planned_memory_gib=round(stage.plan.peak / 2**30, 3) or None,
        )

    def on_sample(self, step: int, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self._emit("sample", **vars(sample))

    def on_train_end(self, stage: Stage, outcome: Outcome) -> None:
        self._emit(
            "end",
            stage=stage.config.stage,
            adapter=str(stage.dir.adapter),
            step=outcome.step,
            seconds=round(outcome.seconds, 3),
            best=None if outcome.best is None else {"eval_loss": outcome.best[0], "step": outcome.best[1]},
            left_out=outcome.skipped,
            warnings=outcome.warnings,
            general_loss=outcome.general_loss,
        )

    def _emit(self, event: str, **fields: Any) -> None:
        record = {"event": event, "time": round(time.time(), 3)}
        for name, value in fields.items():  # JSON has no NaN: a word, as in ``metrics.jsonl``
            record[name] = str(value) if isinstance(value, float) and not math.isfinite(value) else value
        self._out.write(redact(json.dumps(record)) + "\n")
        self._out.flush()


def open_screen(console: Console, *, quiet: bool = False, as_json: bool = False) -> Screen:
    """The screen for the console's output stream.

    Args:
        quiet: no steps.
        as_json: one JSON object a line (with ``quiet``: no steps).
    """
    if as_json:
        return JsonScreen(console, quiet=quiet)
    if quiet:
        return QuietScreen(console)
    out = console.out
    # with FORCE_COLOR rich takes a pipe for a terminal
    terminal = out.is_terminal and not out.is_dumb_terminal and out.file.isatty()
    if console.notebook or (terminal and any(name in os.environ for name in NOTEBOOKS)):
        return Screen(console, most=NOTEBOOK_LINES)
    if terminal and not out.legacy_windows:
        from .panel import LiveScreen

        return LiveScreen(console)
    return Screen(console)
