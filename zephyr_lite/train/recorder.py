"""What a trainer of transformers needs to run like the loop: the order of rows, and the metrics file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from ..config import RunConfig
from ..errors import UserError
from .checkpoint import MetricsLog
from .loop import Metrics, rows_of_step, step_schedule
from .setup import Stage

OnMetrics = Callable[[int, int, Metrics], None]


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
    """Writes ``metrics.jsonl`` under the fused engine's names; evaluates and saves at the last step; stops on NaN."""

    def __init__(self, stage: Stage, log: MetricsLog, unit: str, total: int, on_metrics: OnMetrics) -> None:
        self.stage, self.log, self.unit, self.total, self.on_metrics = stage, log, unit, total, on_metrics
        self.last: Metrics = {}
        self.evaluations: list[Metrics] = []
        self.begun = self.seconds = 0.0
        self.tokens = 0.0
        self.bad = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.begun
        if state.global_step == self.total:
            control.should_evaluate = self.stage.eval_data is not None
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        step, logs = state.global_step, dict(logs or {})
        if "eval_loss" in logs:
            skip = ("eval_runtime", "eval_num_tokens", "eval_samples_per_second", "eval_steps_per_second")
            found = {k: v for k, v in logs.items() if k.startswith("eval_") and k not in skip}
            self.evaluations.append({"step": step, **found})
            self._write(step, found)
        elif "loss" in logs:
            self._training(step, logs)

    def _training(self, step: int, logs: Metrics) -> None:
        self.bad = 0 if math.isfinite(logs["loss"]) else self.bad + 1
        if self.bad == 3:
            raise UserError(f"step {step}: the loss was not finite three times in a row.", "Lower learning_rate.")
        self.tokens, before = logs.pop("num_tokens", self.tokens), self.tokens
        logs["num_tokens"] = self.tokens - before
        if self.unit == "pairs":
            rows = rows_of_step(self.stage.config, len(self.stage.data.rows), step - 1)
            logs["num_pairs"] = float(len(rows))
        done = logs["num_tokens" if self.unit == "tokens" else "num_pairs"]
        per_epoch, _ = step_schedule(self.stage.config, len(self.stage.data.rows))
        logs["epoch"] = round(step / per_epoch, 4)
        logs["seconds"] = round(self.seconds, 4)
        logs[f"{self.unit}_per_second"] = round(done / max(self.seconds, 1e-9), 3)
        self.last = logs
        if step % self.stage.config.logging_steps == 0 or step in (1, self.total):
            self._write(step, logs)

    def _write(self, step: int, metrics: Metrics) -> None:
        self.log.append({"step": step, **metrics})
        self.on_metrics(step, self.total, metrics)
