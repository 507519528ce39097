"""The training loop that every stage shares: steps, micro-batches, schedule, evaluation, callbacks, checkpoints.

One step is ``batch_size`` rows of the recipe (packed rows, or pairs), run in as many micro-batches as the plan
says. Losses are normalized by the step's own count, so neither the split nor the last partial step changes a
gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from ..config import RunConfig
from ..errors import UserError
from ..model.adapters import AdapterStack, total_norm
from ..model.plan import Plan
from ..rundir import StageDir
from .checkpoint import Checkpoint, MetricsLog, prune, resume_point
from .optim import make_optimizer, make_scheduler
from .out_of_memory import Guard, is_out_of_memory
from .steps import Lengths, largest_micro_batches, micro_batches, rows_of_step, step_schedule, tokens_of_largest_step

Metrics = dict[str, float]
# a micro-batch's; what is still a tensor is read when the step is over, so that nobody waits for the device before
Shares = Mapping[str, float | Tensor]


class Task(Protocol):
    """What a stage gives to the loop."""

    unit: str  # what throughput counts: "tokens" or "pairs"
    guard: Guard  # has the plan, and a smaller one where memory runs out

    def follow(self, plan: Plan) -> None:
        """Split and compute as this plan says, from the next micro-batch on."""

    def rows(self) -> Sequence[Sequence[int]]:
        """The recipe's rows, each a list of examples' indices."""

    def lengths(self) -> Lengths:
        """Tokens of each example."""

    def count(self, examples: Sequence[int]) -> int:
        """What a step's loss is normalized by: supervised tokens, or pairs."""

    def loss(self, examples: Sequence[int], step: int, total: int) -> tuple[Tensor, Shares]:
        """A micro-batch's share of the step's loss, with a graph, and metrics that sum up over micro-batches. Tells the
        guard what runs."""

    def summarize(self, sums: Metrics, total: int) -> Metrics:
        """The step's metrics from the sums over its micro-batches."""

    def evaluate(self) -> Metrics:
        """Metrics on the held-out rows, with ``eval_loss`` among them; empty where there are none."""


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        step: optimizer steps done.
        metrics: the last step's.
        best: the lowest eval_loss and its step, or None.
        seconds: of training in this process.
        skipped: steps left out because gradients were not finite.
    """

    step: int
    metrics: Metrics
    best: tuple[float, int] | None
    seconds: float
    skipped: int = 0
    evaluations: list[Metrics] = field(default_factory=list)


class Loop:
    """Trains one adapter.

    Args:
        config: the stage's configuration.
        stage: its folder.
        stack: the live model.
        task: the stage's losses and rows.
        plan: how a step is split and computed; the task follows it, and where memory runs out a smaller one.
        fp16: scale the loss, as float16 gradients need it.
        on_metrics: called with (step, metrics) at every logged step and evaluation.
        callbacks: transformers' callbacks, beside the trackers of ``report_to``.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: StageDir,
        stack: AdapterStack,
        task: Task,
        plan: Plan,
        *,
        fp16: bool = False,
        on_metrics: Callable[[int, int, Metrics], None] = lambda step, total, metrics: None,
        callbacks: Sequence[TrainerCallback] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        self.config, self.stage, self.stack, self.task = config, stage, stack, task
        if plan != task.guard.plan:
            task.follow(plan)
        self.say = say
        self.on_metrics = on_metrics
        self.parameters = stack.parameters()
        self.optimizer = make_optimizer(config, self.parameters)
        self.rows = task.rows()
        self.per_epoch, self.total = step_schedule(config, len(self.rows))
        self.scheduler = make_scheduler(config, self.optimizer, self.total)
        self.device = next(iter(self.parameters.values())).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.handler, self.state, self.control, self.arguments = self._callbacks(callbacks)
        self.best: tuple[float, int] | None = None
        self.stale = 0  # evaluations without a new best
        self._unscaled = False  # whether the scaler has seen this step's gradients

    @property
    def plan(self) -> Plan:
        return self.task.guard.plan

    def run(self) -> Outcome:
        """Train from the last checkpoint, or from the start, to the end.

        Raises:
            UserError: the loss is not finite three steps in a row (float16 loss scaling's search aside); an example does
                not fit into memory under any plan; memory ran out where it must not (see ``_update``).
        """
        torch.set_num_threads(self.plan.threads)
        self.task.guard.record()
        log = MetricsLog(self.stage.metrics)
        step, before = self._resume(log)
        # what an earlier process logged belongs to the run's result too
        evaluations: list[Metrics] = [record for record in before if "eval_loss" in record]
        trained = [record for record in before if "loss" in record]
        metrics: Metrics = {k: v for k, v in trained[-1].items() if k != "step"} if trained else {}
        self.state.global_step, self.state.epoch = step, step / self.per_epoch
        if self.device.type == "cuda":
            self.rehearse()
        self.control = self.handler.on_train_begin(self.arguments, self.state, self.control)
        started, skipped, bad = time.perf_counter(), 0, 0
        patience = self.config.early_stopping_patience
        while step < self.total and not self.control.should_training_stop:
            if patience is not None and self.stale >= patience:
                self.say(f"step {step}: eval_loss has not improved for {patience} evaluations; stopping early.")
                if not (self.stage.path / f"checkpoint-{step}").is_dir():
                    self._save(step)
                break
            begun = time.perf_counter()
            self.control = self.handler.on_step_begin(self.arguments, self.state, self.control)
            metrics, applied, finite = self._step(step)
            step += 1
            skipped += not applied
            # an infinite gradient under a finite loss is how float16 loss scaling finds its scale, which is not below 1
            searching = finite and self.scaler.is_enabled() and self.scaler.get_scale() >= 1
            bad = 0 if applied or searching else bad + 1
            if bad == 3:
                raise UserError(
                    f"step {step}: loss or gradients were not finite three times in a row.",
                    "Lower learning_rate, or look at the rows of these steps; the last checkpoint is untouched.",
                )
            self.state.global_step, self.state.epoch = step, step / self.per_epoch
            self.control = self.handler.on_step_end(self.arguments, self.state, self.control)
            seconds = time.perf_counter() - begun
            metrics.update(epoch=round(step / self.per_epoch, 4), **self._throughput(metrics, seconds))
            if step % self.config.logging_steps == 0 or step in (1, self.total):
                self._log(log, step, metrics)
            last = step == self.total
            due = last or (self.config.eval_steps and step % self.config.eval_steps == 0)
            if due and (found := self.task.evaluate()):
                evaluations.append({"step": step, **found})
                self._log(log, step, found)
                self._judge(step, found["eval_loss"])
                self.control = self.handler.on_evaluate(self.arguments, self.state, self.control, found)
            if (
                last or self.control.should_save or (self.config.save_steps and step % self.config.save_steps == 0)
            ) or (self.best is not None and self.best[1] == step and self.config.load_best_model_at_end):
                self._save(step)
                self.control = self.handler.on_save(self.arguments, self.state, self.control)
        self.handler.on_train_end(self.arguments, self.state, self.control)
        if self.config.load_best_model_at_end and self.best is not None and self.best[1] != step:
            self._restore_best()
        return Outcome(step, metrics, self.best, time.perf_counter() - started, skipped, evaluations)

    def examples_of_step(self, step: int) -> list[int]:
        return [i for row in rows_of_step(self.config, len(self.rows), step) for i in self.rows[row]]

    def gradients(self, step: int) -> tuple[Metrics, int]:
        """Forward and backward of one step, all its micro-batches; gradients are left on the parameters, scaled by the
        loss scaler. Returns the summed metrics and the step's count. Where memory runs out it fails: see ``prepare``."""
        examples = self.examples_of_step(step)
        total = self.task.count(examples)
        sums: dict[str, Any] = {}
        for group in micro_batches(examples, self.task.lengths(), self.plan.micro_tokens):
            loss, parts = self.task.loss(group, step, total)
            self.scaler.scale(loss).backward()
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0.0) + (value.double() if isinstance(value, Tensor) else value)
            del loss  # and with it what all layers' nodes hold
        return {name: float(value) for name, value in sums.items()}, total

    def prepare(self, step: int) -> tuple[Metrics, bool, bool]:
        """Everything of a step that comes before its update: unscaled and clipped gradients are left on the parameters.
        Where memory runs out the whole of it is done again, under a smaller plan.

        Returns:
            the step's metrics, whether its update is to be applied, and whether its loss was finite.
        """

        def work() -> tuple[Metrics, bool, bool]:
            sums, total = self.gradients(step)
            metrics = self.task.summarize(sums, total)
            self._unscaled = True
            self.scaler.unscale_(self.optimizer)
            grads = [p.grad for p in self.parameters.values() if p.grad is not None]
            norm = total_norm(grads)
            finite = math.isfinite(metrics["loss"])
            metrics["grad_norm"] = norm.item()
            metrics["learning_rate"] = self.scheduler.get_last_lr()[0]
            applied = finite and math.isfinite(metrics["grad_norm"])
            if applied:
                torch._foreach_mul_(grads, torch.clamp(self.config.max_grad_norm / (norm + 1e-6), max=1.0))
            return metrics, applied, finite

        self.optimizer.zero_grad(set_to_none=True)
        self._unscaled = False
        return self.task.guard(work, self._undo)

    def rehearse(self) -> list[list[int]]:
        """Forward and backward of as large micro-batches as there can be, that of the longest example and the one of most
        tokens, and keep nothing of them: what does not fit on the card shows before the first step, not hours later, and
        the plan adapts to it. Where steps have several micro-batches the gradients of those before lie there too. Returns
        their examples."""
        lengths = self.task.lengths()

        def work() -> list[list[int]]:
            groups = largest_micro_batches(lengths, self.plan.micro_tokens)
            if tokens_of_largest_step(self.config, self.rows, lengths) > self.plan.micro_tokens:
                for parameter in self.parameters.values():
                    parameter.grad = torch.zeros_like(parameter)
            for group in groups:
                # the number of no step: it decides nothing but dropout
                loss, _ = self.task.loss(group, self.total, self.task.count(group))
                self.scaler.scale(loss).backward()
                del loss
            return groups

        groups = self.task.guard(work, self._undo)
        self._undo()
        return groups

    def _undo(self) -> None:
        """Forget the gradients, and that the scaler has seen them."""
        self.optimizer.zero_grad(set_to_none=True)
        if self._unscaled and self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale())  # the same scale; gradients may be unscaled once an update
        self._unscaled = False

    def _step(self, step: int) -> tuple[Metrics, bool, bool]:
        """One optimizer step; returns its metrics, whether it was applied, and whether its loss was finite."""
        metrics, applied, finite = self.prepare(step)
        if applied:
            self._update(step)
        else:
            norm = metrics["grad_norm"]
            self.say(f"step {step + 1}: loss {metrics['loss']:.4g}, gradient norm {norm:.4g}: step left out.")
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        # the schedule follows the rows, not the updates: a step left out is over all the same
        self.scheduler.step()
        return metrics, applied, finite

    def _update(self, step: int) -> None:
        """Change the adapter. This cannot be redone: what was changed already would change twice. The fused AdamW and
        bitsandbytes' kernels for GPUs allocate nothing, their state lies there since before the first step; bitsandbytes
        on a CPU does allocate.

        Raises:
            UserError: memory ran out.
        """
        try:
            self.optimizer.step()  # the gradients are unscaled and finite already, so the scaler has no say in it
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"step {step + 1}: memory ran out while the adapter was being changed ({str(error).splitlines()[0]}).",
                "The last checkpoint is untouched: start the same command again, and the run goes on from it.",
            ) from None

    def _throughput(self, metrics: Metrics, seconds: float) -> Metrics:
        done = metrics.get("num_tokens" if self.task.unit == "tokens" else "num_pairs", 0.0)
        return {"seconds": round(seconds, 4), f"{self.task.unit}_per_second": round(done / max(seconds, 1e-9), 3)}

    def _log(self, log: MetricsLog, step: int, metrics: Metrics) -> None:
        log.append({"step": step, **metrics})
        self.state.log_history.append({"step": step, **metrics})
        self.control = self.handler.on_log(self.arguments, self.state, self.control, dict(metrics))
        self.on_metrics(step, self.total, metrics)

    def _judge(self, step: int, loss: float) -> None:
        if self.best is None or loss < self.best[0]:
            self.best, self.stale = (loss, step), 0
        else:
            self.stale += 1

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.stack, self.parameters, self.optimizer, self.scheduler, self.scaler)

    def _save(self, step: int) -> None:
        self._checkpoint().write(self.stage, step, {"best": self.best, "stale": self.stale, "total": self.total})
        prune(self.stage, keep=self.config.save_total_limit, best=self.best[1] if self.best else None)

    def _resume(self, log: MetricsLog) -> tuple[int, list[Metrics]]:
        """The step to go on from, and what was logged up to it."""
        found = resume_point(self.stage)
        if found is None:
            log.truncate(0)
            return 0, []
        extra = self._checkpoint().read(found)
        if extra["total"] != self.total:
            raise UserError(
                f"{found}: was written by a run of {extra['total']} steps; this one has {self.total}.",
                "Go back to the configuration that the run was started with, or choose another output_dir.",
            )
        self.best = tuple(extra["best"]) if extra["best"] else None  # type: ignore[assignment]
        self.stale = extra["stale"]
        self.say(f"going on from {found.name}")
        return extra["step"], log.truncate(extra["step"])

    def _restore_best(self) -> None:
        assert self.best is not None
        folder = self.stage.path / f"checkpoint-{self.best[1]}"
        self._checkpoint().read_adapter(folder)
        self.say(f"took the adapter of step {self.best[1]}, eval_loss {self.best[0]:.4f}")

    def _callbacks(self, callbacks: Sequence[TrainerCallback]):
        # transformers' integrations read their settings from its own arguments
        arguments = TrainingArguments(
            output_dir=str(self.stage.path),
            report_to=self.config.report_to or "none",
            logging_steps=self.config.logging_steps,
            run_name=f"{self.stage.run.name}-{self.stage.path.name}",
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            save_strategy="no",  # the loop saves and evaluates by itself
            eval_strategy="no",
        )
        try:
            trackers = [cls() for cls in get_reporting_integration_callbacks(self.config.report_to)]
        except (ImportError, RuntimeError, ValueError) as error:
            raise UserError(
                f"report_to {self.config.report_to}: {error}", "Install the tracker, or leave it out."
            ) from None
        handler = CallbackHandler(
            [DefaultFlowCallback(), *trackers, *callbacks], self.stack.model, None, self.optimizer, self.scheduler
        )
        state = TrainerState(max_steps=self.total, num_train_epochs=math.ceil(self.config.num_train_epochs))
        state.is_local_process_zero = state.is_world_process_zero = True
        return handler, state, TrainerControl(), arguments
