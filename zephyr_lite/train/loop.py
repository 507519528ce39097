"""The training loop that every stage shares: steps, micro-batches, schedule, evaluation, callbacks, checkpoints.

One step is ``batch_size`` rows of the recipe (packed rows, or pairs), run in as many micro-batches as the plan
says. Losses are normalized by the step's own count, so neither the split nor the last partial step changes a
gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from ..config.load import RunConfig
from ..errors import Interrupted, UserError
from ..io.interrupts import Output, StopRequest
from ..io.run_dir import StageDir
from ..io.sync import Mirror
from ..memory.machine import peak_memory, reset_peak_memory
from ..memory.plan import Plan
from ..model.adapters import AdapterStack
from .callbacks import make_callbacks
from .checkpoint import Checkpoint, MetricsLog, checkpoint_fault, prune, resume_point
from .distributed import PeerEnded, everywhere
from .monitors import IN_A_ROW, DpoCollapseMonitor
from .objective import Metrics, Objective, Outcome
from .observer import Observer, Sample
from .stepper import Stepper
from .trouble import SkippedSteps, suspects


class Loop(Stepper):
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
        writes: False in all but one of a run's processes: the folder is only read.
        observer: is told of every step, evaluation and sample.
        begun: is called with the step that training begins after.
        draw: answers held-out prompts after so many steps.
        collapse: warns of a preference optimization that collapses.
        mirror: copies checkpoints elsewhere.
        forget_best: the best of before was judged on other rows than those held out now.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: StageDir,
        stack: AdapterStack,
        task: Objective,
        plan: Plan,
        *,
        fp16: bool = False,
        on_metrics: Callable[[int, int, Metrics], None] = lambda step, total, metrics: None,
        callbacks: Sequence[TrainerCallback] = (),
        writes: bool = True,
        observer: Observer | None = None,
        begun: Callable[[int], None] | None = None,
        draw: Callable[[int], Sequence[Sample]] = lambda step: [],
        collapse: DpoCollapseMonitor | None = None,
        mirror: Mirror | None = None,
        forget_best: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.mirror, self.forget_best, self.writes = mirror, forget_best, writes
        super().__init__(config, stack, task, plan, fp16=fp16)
        self.stage, self.observer, self.begun, self.draw = stage, observer or Observer(), begun, draw
        self.output = Output()
        self.say, self.on_metrics = self.output.of(say), self.output.of(on_metrics)
        self.handler, self.state, self.control, self.arguments = make_callbacks(
            config, stage, stack.model, self.optimizer, self.scheduler, self.total, callbacks
        )
        self.log = MetricsLog(stage.metrics, writes=writes)
        self.left_out = SkippedSteps(stage.path, self.say, writes=writes)
        self.sample_log = MetricsLog(stage.samples, writes=writes)
        self.best: tuple[float, int] | None = None
        self.stale = 0  # evaluations without a new best
        self.collapse = collapse
        # while steps are left out: the step before the first of them, and what ``_watch`` was given (None: in its checkpoint)
        self.before_trouble: tuple[int, dict[str, Any] | None] | None = None
        self.metrics: Metrics = {}  # the last step's
        self.evaluations: list[Metrics] = []
        self.sampled: set[int] = set()  # steps whose samples are in the log
        self.warnings: list[str] = []

    def run(self) -> Outcome:
        """Train from the last checkpoint, or from the start, to the end.

        Raises:
            Interrupted: a signal came; the step was finished, and there is a checkpoint of it.
            UserError: loss or gradients are not finite three steps in a row (float16 loss scaling's search aside); an
                example does not fit into memory under any plan; memory ran out where it must not (see ``_update``).
        """
        torch.set_num_threads(self.plan.threads)
        reset_peak_memory(self.device)
        self.task.guard.record()
        with StopRequest("the step is finished and a checkpoint written") as stop:
            return self._run(stop)

    def _run(self, stop: StopRequest) -> Outcome:
        with stop.at_once():
            step, pending = self._resume()
            if self.device.type == "cuda":
                self.rehearse()
            self.control = self.handler.on_train_begin(self.arguments, self.state, self.control)
        started = time.perf_counter()
        if self.begun is not None and self.writes:
            self.begun(step)
        if step == 0 or any(record["step"] == step for record in self.evaluations):
            self._sample(step, stop)  # again, where a signal came while they were drawn
        if pending:  # it was stopped between a step and the evaluation that follows it
            self._after(step, stop)
        patience = self.config.early_stopping_patience
        while step < self.total and not self.control.should_training_stop:
            if patience is not None and self.stale >= patience:
                self.say(f"step {step}: eval_loss has not improved for {patience} evaluations; stopping early.")
                if not self._is_saved(step):
                    self._save(step)
                break
            begun = time.perf_counter()
            self.control = self.handler.on_step_begin(self.arguments, self.state, self.control)
            before = {
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "finite": self.left_out.watch.state(),
                "logged": self.log.count,
            }
            self.metrics, applied, finite = self._step(step)
            step += 1
            self._watch(step, applied=applied, finite_loss=finite, before=before)
            self.state.global_step, self.state.epoch = step, step / self.per_epoch
            self.control = self.handler.on_step_end(self.arguments, self.state, self.control)
            seconds = time.perf_counter() - begun
            self.metrics.update(epoch=round(step / self.per_epoch, 4), **self._throughput(self.metrics, seconds))
            if step % self.config.logging_steps == 0 or step in (1, self.total):
                self._log(step, self.metrics)
            self.observer.stepped(step, self.metrics)
            self._after(step, stop)
        self.handler.on_train_end(self.arguments, self.state, self.control)
        if self.config.load_best_model_at_end and self.best is not None and self.best[1] != step:
            self._restore_best()
        return Outcome(
            step,
            self.metrics,
            self.best,
            time.perf_counter() - started,
            self.left_out.watch.count,
            self.evaluations,
            self.warnings,
            self._asked(stop)[0],
        )

    def _after(self, step: int, stop: StopRequest) -> None:
        """What is due after a step: an evaluation, a checkpoint.

        Raises:
            Interrupted: a signal came. An evaluation that is due but was not finished is the next start's first work.
            OSError: nothing can be printed any more; there is a checkpoint.
        """
        last = step == self.total
        if last or (self.config.eval_steps and step % self.config.eval_steps == 0):

            def measured() -> Metrics:
                with stop.at_once():
                    return self.task.measure()

            try:
                found = self.task.evaluation(self.world.sums(measured))
            except (KeyboardInterrupt, PeerEnded) as error:
                if isinstance(error, PeerEnded) and not error.interrupted:
                    raise
                name, _ = self._asked(stop)
                self._save(step, pending=True)
                raise interrupted(name, self.stage, step, self.total) from None
            if found:
                self.evaluations.append({"step": step, **found})
                self._log(step, found)
                self._judge(step, found["eval_loss"])
                self.observer.evaluated(step, found)
                self._sample(step, stop)
                self.control = self.handler.on_evaluate(self.arguments, self.state, self.control, found)
        # while steps are left out the newest is to stay the one from before
        periodic = self.config.save_steps and step % self.config.save_steps == 0 and self.before_trouble is None
        due = last or self.control.should_save or periodic
        is_best = self.best is not None and self.best[1] == step and self.config.load_best_model_at_end
        name, mute = self._asked(stop)
        if due or is_best or name is not None or mute:
            self._save(step)
            self.control = self.handler.on_save(self.arguments, self.state, self.control)
        if name is not None and not last:  # at the end there is nothing left to stop
            raise interrupted(name, self.stage, step, self.total)
        if mute and not last:
            raise self.output.fault or PeerEnded("the process that prints cannot do so any more", 2)

    def _asked(self, stop: StopRequest) -> tuple[str | None, bool]:
        """What asks for the end, in any of the run's processes: the signal that came, and whether nothing can be printed any
        more. All of them call it at the same point, and have the same answer."""
        found = self.world.gather((stop.name, self.output.fault is not None))
        return next((name for name, _ in found if name is not None), None), any(mute for _, mute in found)

    def _is_saved(self, step: int) -> bool:
        return self.world.lead((self.stage.path / f"checkpoint-{step}").is_dir)

    def _sample(self, step: int, stop: StopRequest) -> None:
        """Answer the held-out prompts, unless a process before this one did so at this step, or a signal comes."""
        if step in self.sampled or not self.writes:
            return
        try:
            with stop.at_once():
                samples = self.draw(step)
        except KeyboardInterrupt:
            return  # ``stop`` knows of it
        for sample in samples:
            self.sample_log.append(sample.as_dict())
        self.sampled.add(step)
        if samples:
            self.observer.sampled(step, samples)

    def _watch(self, step: int, *, applied: bool, finite_loss: bool, before: dict[str, Any]) -> None:
        """Look at a step's numbers: warn, write down a step that was left out, stop where it happens again and again.

        Args:
            before: what a step that is left out changes all the same (schedule, loss scale, logs), as it was before.

        Raises:
            UserError: three steps in a row; the checkpoint of before the first of them is written.
        """
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        what = self.left_out.watch.saw(applied=applied, finite_loss=finite_loss, scale=scale)
        if what == "applied":
            self.before_trouble = None
            if self.collapse is not None and (warning := self.collapse.saw(step, self.metrics)):
                self._warn(warning)
            return
        if what == "searching":
            self.say(
                f"step {step}: a gradient was too large for the loss scale, which is now {scale:g}: step left out."
            )
            return
        if self.before_trouble is None:
            self.before_trouble = step - 1, before
        examples = self.examples_of_step(step - 1)
        rows, alone = self.world.lead(
            lambda: suspects(self.task, step - 1, examples, self.parameters.values(), self._undo)
        )
        named = self.left_out.add(step, self.metrics, rows, alone=alone)
        if self.left_out.watch.in_a_row == IN_A_ROW:
            raise everywhere(self.left_out.end(step, named, self._step_back()))

    def _step_back(self) -> str:
        """Leave a checkpoint from before the trouble; returns what to say of it. The adapter has not changed since."""
        assert self.before_trouble is not None
        step, before = self.before_trouble
        if step == 0:
            return "Nothing had been trained before."
        if before is None:
            return f"checkpoint-{step} has the adapter of before: none of these steps changed it."
        if not self._is_saved(step):
            self.scheduler.load_state_dict(before["scheduler"])
            for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr()):
                group["lr"] = rate
            self.scaler.load_state_dict(before["scaler"])
            self.left_out.watch.load(before["finite"])
            self._save(step, logged=before["logged"])
        return f"checkpoint-{step} is from before."

    def _warn(self, warning: str) -> None:
        self.say(warning)
        self.warnings.append(warning)

    def _throughput(self, metrics: Metrics, seconds: float) -> Metrics:
        done = metrics.get("num_tokens" if self.task.unit == "tokens" else "num_pairs", 0.0)
        return {
            "seconds": round(seconds, 4),
            f"{self.task.unit}_per_second": round(done / max(seconds, 1e-9), 3),
            "peak_memory_gib": round(peak_memory(self.device) / 2**30, 3),
        }

    def _log(self, step: int, metrics: Metrics) -> None:
        self.log.append({"step": step, **metrics})
        self.state.log_history.append({"step": step, **metrics})
        self.control = self.handler.on_log(self.arguments, self.state, self.control, dict(metrics))
        self.on_metrics(step, self.total, metrics)

    def _judge(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            self.say(f"step {step}: the held-out loss is not finite; it counts as one that did not improve.")
        if math.isfinite(loss) and (self.best is None or loss < self.best[0]):
            self.best, self.stale = (loss, step), 0
        else:
            self.stale += 1

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.stack, self.parameters, self.optimizer, self.scheduler, self.scaler)

    def _save(self, step: int, *, pending: bool = False, logged: int | None = None) -> None:
        """Write a checkpoint, then delete older ones. What was logged up to it is on the disk before it is.

        Args:
            pending: the evaluation that is due after this step was not made.
            logged: records of the metrics up to this step; all there are by default.
        """
        self.world.together(lambda: self._write(step, pending, logged) if self.writes else None)

    def _write(self, step: int, pending: bool, logged: int | None) -> None:
        for log in (self.log, self.left_out.log, self.sample_log):
            log.flush()
        self._checkpoint().write(
            self.stage,
            step,
            {
                "best": self.best,
                "stale": self.stale,
                "total": self.total,
                "pending": pending,
                "finite": self.left_out.watch.state(),
                "collapse": self.collapse.state() if self.collapse is not None else None,
                "warnings": self.warnings,
                "logged": self.log.count if logged is None else logged,
            },
        )
        self._prune()
        if self.mirror is not None:
            self.mirror.changed(self.best[1] if self.best else None)

    def _prune(self) -> None:
        busy = self.mirror.busy() if self.mirror is not None else frozenset()
        if self.before_trouble is not None:
            busy |= {f"checkpoint-{self.before_trouble[0]}"}
        best = self.best[1] if self.best else None
        prune(self.stage, keep=self.config.save_total_limit, best=best, busy=busy)

    def _resume(self) -> tuple[int, bool]:
        """The step to go on from, and whether its evaluation is still due. What was logged up to it is the run's too."""
        found = self.world.lead(lambda: resume_point(self.stage, self.say))
        step, pending, logged = 0, False, None
        if found is not None:
            extra = self.world.together(lambda: self._checkpoint().read(found))
            if extra["total"] != self.total:
                raise everywhere(
                    UserError(
                        f"{found}: was written by a run of {extra['total']} steps; this one has {self.total}.",
                        "Go back to the configuration that the run was started with, or choose another output_dir.",
                    )
                )
            if not self.forget_best:
                best = extra["best"]
                self.best = (float(best[0]), int(best[1])) if best else None
                self.stale = extra["stale"]
            self.left_out.watch.load(extra.get("finite") or {})
            if self.left_out.watch.in_a_row:  # it was stopped among steps that were left out
                self.before_trouble = extra["step"], None
            if self.collapse is not None:
                self.collapse.load(extra.get("collapse") or {})
            self.warnings = list(extra.get("warnings") or [])
            self.say(f"going on from {found.name}")
            step, pending, logged = extra["step"], bool(extra.get("pending")), extra.get("logged")
            if self.writes:
                self._prune()  # the process before may have ended between a checkpoint and this
        self.left_out.log.truncate(step)
        self.sampled = {record["step"] for record in self.sample_log.truncate(step)}
        before = self.log.truncate(step, logged=logged, pending=pending, say=self.say)
        self.evaluations = [record for record in before if "eval_loss" in record]
        trained = [record for record in before if "loss" in record]
        self.metrics = {k: v for k, v in trained[-1].items() if k != "step"} if trained else {}
        self.state.global_step, self.state.epoch = step, step / self.per_epoch
        return step, pending

    def _restore_best(self) -> None:
        assert self.best is not None
        folder = self.stage.path / f"checkpoint-{self.best[1]}"
        if (fault := checkpoint_fault(folder)) is not None:  # no reason to lose the last step's
            self._warn(f"{folder.name}, the best, cannot be taken ({fault}); the adapter is the last step's.")
            return
        self._checkpoint().read_adapter(folder)
        self.say(f"took the adapter of step {self.best[1]}, eval_loss {self.best[0]:.4f}")


def interrupted(signal: str | None, stage: StageDir, step: int, total: int) -> Interrupted:
    """What is said when a run ended because of a signal."""
    return Interrupted(
        f"{signal}: stopped after step {step} of {total}; {stage.path / f'checkpoint-{step}'} holds everything. "
        "The same command goes on from there."
    )
