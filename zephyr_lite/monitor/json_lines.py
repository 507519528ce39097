"""``--json``: one JSON object a line on standard output, for programs. The events are listed in docs/watch.md."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from types import TracebackType
from typing import Any

from ..cli.console import Console, Metrics
from ..errors import Interrupted, UserError
from ..io.redact import redact
from ..train.distributed import PeerEnded
from ..train.objective import Outcome
from ..train.observer import Sample
from ..train.stage import Stage
from .show import Screen


class JsonScreen(Screen):
    """Events as lines of JSON. Whatever else is printed inside the context goes to standard error.

    Args:
        quiet: no events of steps.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        super().__init__(console)
        self.quiet = quiet
        self._out = console.out.file
        self._aside = redirect_stdout(sys.stderr)
        self._seconds: deque[float] = deque(maxlen=20)

    def __enter__(self) -> JsonScreen:
        self._out = self.console.out.file
        self._aside.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._aside.__exit__(kind, error, trace)
        if error is None or isinstance(error, SystemExit | BrokenPipeError):
            return
        if isinstance(error, UserError | Interrupted | PeerEnded):
            message = error.message
        else:
            message = f"{type(error).__name__}: {error}"
        with suppress(OSError):  # what ended the command is said on standard error too
            self._emit("error", kind=_kind(error), message=message, hint=getattr(error, "hint", "") or "")

    def say(self, text: str = "") -> None:
        self._emit("say", text=text)

    def metrics(self, step: int, total: int, metrics: Metrics) -> None:
        if any(name.startswith("eval_") for name in metrics):
            self._emit("eval", step=step, total=total, **metrics)
        elif not self.quiet:
            if "seconds" in metrics:
                self._seconds.append(metrics["seconds"])
            left = sum(self._seconds) / len(self._seconds) * (total - step) if self._seconds else None
            self._emit("step", step=step, total=total, seconds_left=left, **metrics)

    # An observer must not end a run in the middle of a step: where nobody reads any more, the next ``say`` or
    # ``metrics`` raises again, and the loop ends in good order.

    def begins(self, stage: Stage, unit: str, total: int, step: int) -> None:
        with suppress(OSError):
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

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        with suppress(OSError):
            for sample in samples:
                self._emit("sample", **sample.as_dict())

    def ends(self, stage: Stage, outcome: Outcome) -> None:
        with suppress(OSError):
            self._emit(
                "end",
                stage=stage.config.stage,
                adapter=str(stage.dir.adapter),
                step=outcome.step,
                seconds=round(outcome.seconds, 3),
                best=None if outcome.best is None else {"eval_loss": outcome.best[0], "step": outcome.best[1]},
                left_out=outcome.skipped,
                warnings=outcome.warnings,
            )

    def _emit(self, event: str, **fields: Any) -> None:
        record = {"event": event, "time": round(time.time(), 3)}
        record.update({name: _plain(value) for name, value in fields.items()})
        # a name of a file may hold bytes that are no UTF-8: ASCII with escapes can always be written
        self._out.write(redact(json.dumps(record)) + "\n")
        self._out.flush()


def _kind(error: BaseException) -> str:
    """What the exit code says, in a word; another process's error counts as that process's own."""
    if isinstance(error, PeerEnded):
        return "interrupted" if error.interrupted else "user" if error.code == 2 else "failed"
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return "interrupted"
    return "user" if isinstance(error, UserError) else "failed"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words, as in ``metrics.jsonl``."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
