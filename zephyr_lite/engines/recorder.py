"""What a trainer of transformers needs to run like our loop: the order of rows, the metrics file, signals, manifests."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from ..config.load import RunConfig
from ..io.atomic import write_manifest
from ..io.interrupts import StopRequest
from ..train.checkpoint import MetricsLog, replay
from ..train.loop import add_speed
from ..train.monitors import DpoCollapseMonitor, SkippedSteps
from ..train.stage import Metrics, Observer, Observers, Stage
from ..train.steps import rows_of_step, step_schedule

logger = logging.getLogger(__name__)

# transformers' own, which metrics.jsonl has under other names or not at all
_LEFT_OUT = ("eval_runtime", "eval_num_tokens", "eval_samples_per_second", "eval_steps_per_second")


class Order(torch.utils.data.Sampler[int]):
    """The rows in the fused engine's order, epoch by epoch."""

    def __init__(self, config: RunConfig, rows: int) -> None:
        self.config, self.rows, self.epoch = config, rows, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        per_epoch, _ = step_schedule(self.config, self.rows)
        for step in range(self.epoch * per_epoch, (self.epoch + 1) * per_epoch):
            yield from rows_of_step(self.config, self.rows, step)


class Recorder(TrainerCallback):
    """Writes ``metrics.jsonl`` under the fused engine's names; evaluates and saves at the last step; skips a step whose
    gradients are not finite, and stops after three in a row; stops with a checkpoint when a signal came."""

    def __init__(self, stage: Stage, observers: Sequence[Observer] = ()) -> None:
        self.stage, self.observers = stage, Observers(observers)
        self.unit = "tokens" if stage.method == "sft" else "pairs"
        self.log, self.left_out = MetricsLog(stage.dir.metrics), SkippedSteps(stage.dir.path)
        _, self.total = step_schedule(stage.config, len(stage.data.rows))
        self.stop: StopRequest | None = None
        self.last: Metrics = {}
        self.evaluations: list[Metrics] = []
        self.warnings: list[str] = []
        self.collapse = DpoCollapseMonitor() if stage.method == "dpo" else None
        self.begun = self.tokens = 0.0
        self.seconds: list[float] = []  # of each step
        self.trainer: Any = None  # set when there is one

    def resume(self, step: int) -> None:
        """Take over what was logged up to a checkpoint's step."""
        self.evaluations, self.last = replay(self.log.truncate(step), self.collapse)
        self.left_out.count = len(self.left_out.log.truncate(step))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trained = [p for p in model.parameters() if p.grad is not None]
        # the scaler of float16 skips by itself
        if not args.fp16 and not all(bool(torch.isfinite(p.grad).all()) for p in trained):
            for parameter in trained:  # the optimizer passes over parameters without gradient
                parameter.grad = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begun)
        if state.global_step == self.total:
            control.should_evaluate = self.stage.eval_data is not None
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log.flush()
        # transformers writes in place: without a manifest the checkpoint is not complete
        write_manifest(self.stage.dir.path / f"checkpoint-{state.global_step}")
        if self.stage.mirror is not None:
            self.stage.mirror.changed(state.best_global_step or None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        step, logs = state.global_step, dict(logs or {})
        if "eval_loss" in logs:
            found = {k: v for k, v in logs.items() if k.startswith("eval_") and k not in _LEFT_OUT}
            self.evaluations.append({"step": step, **found})
            self._write(step, found)
            self.observers.tell("on_evaluate", step, found)
        elif "loss" in logs:
            self._training(step, logs)
        ends = self.observers.fault is not None or (self.stop is not None and self.stop.name is not None)
        if ends and step < self.total:
            control.should_save = control.should_training_stop = True

    def _training(self, step: int, logs: Metrics) -> None:
        data = self.stage.data
        rows = rows_of_step(self.stage.config, len(data.rows), step - 1)
        # accelerate's scaler does not tell its scale: every step before the first update counts as its search
        kind = self.left_out.kind(logs, 1.0 if self.stage.base.dtype == torch.float16 else None)
        self.left_out.count_step(kind)
        if not math.isfinite(logs["loss"]):
            self.trainer._tr_loss.zero_()  # transformers subtracts what was logged, which is not a number
        if kind == "bad":
            where = [data.examples[example].where for row in rows for example in data.rows[row]]
            error = self.left_out.add(step, logs, where, "The last checkpoint is untouched.", alone=None)
            if error is not None:
                raise error
        elif kind == "applied" and self.collapse is not None and (warning := self.collapse.saw(step, logs)):
            logger.warning(warning)
            self.warnings.append(warning)
        self.tokens, before = logs.pop("num_tokens", self.tokens), self.tokens
        logs["num_tokens"] = self.tokens - before
        if self.unit == "pairs":
            logs["num_pairs"] = float(len(rows))
        add_speed(logs, self.stage, self.unit, step, self.seconds[-1])
        self.last = logs
        self.observers.tell("on_step_end", step, logs)
        if step % self.stage.config.logging_steps == 0 or step in (1, self.total):
            self._write(step, logs)

    def _write(self, step: int, metrics: Metrics) -> None:
        self.log.append({"step": step, **metrics})
        self.observers.tell("on_log", step, metrics)
