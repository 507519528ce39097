"""The training loop that all methods share.

One step is ``batch_size`` rows of the recipe (packed rows, or pairs), run in as many micro-batches as the plan says. Losses
are divided by the step's own number of targets, so neither the split nor a last partial step changes a gradient.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Interrupted
from ..io.interrupts import StopRequest
from ..io.run_dir import StageDir
from ..memory.machine import peak_memory, reset_peak_memory
from .checkpoint import MetricsLog, restore_best, resume, save
from .distributed import everywhere, sum_by_name, world
from .monitors import SkippedSteps
from .optim import make_buffers, make_optimizer, make_scheduler
from .stage import Metrics, Objective, Observer, Observers, Outcome, Sample, Stage
from .steps import largest_micro_batches, micro_batches, rows_of_step, step_schedule

logger = logging.getLogger(__name__)


class TrainState:
    """A run in progress, before its first step, with the optimizer's state allocated."""

    def __init__(self, stage: Stage, objective: Objective, *, observers: Sequence[Observer] = ()) -> None:
        self.stage, self.objective, self.observers = stage, objective, Observers(observers)
        self.parameters = stage.stack.parameters()  # the adapter's float32 weights, by name
        _, self.total = step_schedule(stage.config, len(stage.data.rows))
        # all gradients in one tensor, of which the parameters' are views: one all-reduce sums them in place
        buffers, self.gradients = make_buffers(stage.config, self.parameters)
        self.optimizer = make_optimizer(stage.config, buffers)
        self.scheduler = make_scheduler(stage.config, self.optimizer, self.total)
        self.scaler = torch.amp.GradScaler(stage.base.device.type, enabled=stage.base.dtype == torch.float16)
        self.log = MetricsLog(stage.dir.metrics, writes=stage.writes)
        self.sample_log = MetricsLog(stage.dir.samples, writes=stage.writes)
        self.skipped = SkippedSteps(stage.dir.path, writes=stage.writes)
        self.step = 0  # optimizer steps done
        self.metrics: Metrics = {}  # of the last step
        self.evaluations: list[Metrics] = []
        self.sampled: set[int] = set()  # steps at which samples were drawn
        self.best: tuple[float, int] | None = None  # the lowest eval_loss with its step
        self.stale = 0  # evaluations since
        self.warnings: list[str] = []  # printed about the run's numbers
        self.seconds: list[float] = []  # of each step of this process, evaluations aside
        self.before_skips: int | None = (
            None  # while steps are skipped, the step of the checkpoint from before the first
        )
        zero_gradients(self)


def train(state: TrainState) -> Outcome:
    """Train from the last checkpoint, or from the start, to the end.

    Raises:
        Interrupted: a signal came; the step was finished, and there is a checkpoint of it.
        UserError: loss or gradients were not finite three steps in a row (the loss scaler's search aside); an example does
            not fit into memory under any plan.
    """
    stage, config, objective = state.stage, state.stage.config, state.objective
    torch.set_num_threads(stage.plan.threads)
    reset_peak_memory(stage.base.device)
    objective.oom.record()
    with StopRequest("finishing the step and writing a checkpoint") as stop:
        with stop.at_once():
            evaluation_due = resume(state)
            if stage.base.device.type == "cuda":
                warmup_largest_batch(state)
        started, patience = time.perf_counter(), config.early_stopping_patience
        state.observers.tell("on_train_begin", stage, objective.unit, state.total, state.step)
        if state.step == 0 or any(record["step"] == state.step for record in state.evaluations):
            _sample(state, stop)  # again, if a signal interrupted it
        if evaluation_due:
            _evaluate(state, stop)
            _save_if_due(state, stop)
        while state.step < state.total:
            if patience is not None and state.stale >= patience:
                logger.info(f"step {state.step}: eval_loss has not improved in {patience} evaluations; stopping early.")
                _save_once(state)
                break
            begun = time.perf_counter()
            state.observers.tell("on_step_begin", state.step)
            state.metrics = accumulate_gradients(state, state.step)
            _check_numbers(state)
            update(state, state.metrics)
            state.step += 1
            state.seconds.append(time.perf_counter() - begun)
            add_speed(state.metrics, stage, objective.unit, state.step, state.seconds[-1])
            if state.step % config.logging_steps == 0 or state.step in (1, state.total):
                _log(state, state.metrics)
            state.observers.tell("on_step_end", state.step, state.metrics)
            _evaluate(state, stop)
            _save_if_due(state, stop)
        if config.load_best_model_at_end and state.best is not None and state.best[1] != state.step:
            restore_best(state)
        return Outcome(
            state.step,
            state.metrics,
            state.best,
            time.perf_counter() - started,
            state.skipped.count,
            state.evaluations,
            state.warnings,
            _asked_to_stop(state, stop)[0],
            step_seconds=state.seconds,
        )


def add_speed(metrics: Metrics, stage: Stage, unit: str, step: int, seconds: float) -> None:
    """Add a step's epoch, time, throughput and peak memory to its metrics."""
    per_epoch, _ = step_schedule(stage.config, len(stage.data.rows))
    metrics |= {
        "epoch": round(step / per_epoch, 4),
        "seconds": round(seconds, 4),
        f"{unit}_per_second": round(metrics.get(f"num_{unit}", 0.0) / max(seconds, 1e-9), 3),
        "peak_memory_gib": round(peak_memory(stage.base.device) / 2**30, 3),
    }


# One step


def examples_of_step(state: TrainState, step: int) -> list[int]:
    """Indices of the examples in a step's rows."""
    rows = state.objective.data.rows
    examples: list[int] = []
    for row in rows_of_step(state.stage.config, len(rows), step):
        examples += rows[row]
    return examples


def accumulate_gradients(state: TrainState, step: int) -> Metrics:
    """Everything of a step before its update: unscaled and clipped gradients are left on the parameters. Where memory runs
    out the passes are done again under a smaller plan. Returns the step's metrics."""
    objective, here, oom = state.objective, world(), state.objective.oom
    lengths, examples = objective.data.lengths, examples_of_step(state, step)
    total = objective.num_targets(examples)
    objective.begin_step(examples)
    sums: dict[str, Any] = {}
    for attempt in oom.attempts():
        zero_gradients(state)
        sums.clear()
        with attempt:
            for group in micro_batches(here.shard(examples, lengths), lengths, state.stage.plan.micro_tokens):
                for name, value in forward_backward(state, group, step, total).items():
                    sums[name] = sums.get(name, 0.0) + (value.double() if isinstance(value, Tensor) else value)
            for name, value in sums.items():
                sums[name] = float(value)
    here.all_reduce(state.gradients)
    metrics = objective.metrics(sum_by_name(here.all_gather(sums)), total)
    for attempt in oom.attempts():
        with attempt:
            state.scaler.unscale_(state.optimizer)
    for attempt in oom.attempts():
        with attempt:
            metrics["grad_norm"] = clip_gradients(state)
    metrics["learning_rate"] = state.scheduler.get_last_lr()[0]
    return metrics


def forward_backward(state: TrainState, group: Sequence[int], step: int, total: Any) -> dict[str, float | Tensor]:
    """Add the gradients of one micro-batch, times the loss scale; returns its sums for the metrics."""
    loss, sums = state.objective.loss(group, step, total)
    state.scaler.scale(loss).backward()
    return {"loss": loss.detach(), **sums}


def update(state: TrainState, metrics: Metrics) -> bool:
    """Change the adapter, unless loss or gradients are not finite; returns whether it was changed. The schedule advances
    either way, because it follows the rows.

    An update is not retried: what was changed already would change twice. The fused AdamW and bitsandbytes' kernels for GPUs
    allocate nothing.
    """
    applied = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
    if applied:
        state.optimizer.step()  # not through the scaler: the gradients are unscaled and finite
    if state.scaler.is_enabled():
        state.scaler.update()
    state.scheduler.step()
    return applied


def clip_gradients(state: TrainState) -> float:
    """Scale the gradients down to a norm of ``max_grad_norm`` (0: never); returns their norm."""
    max_norm, norm = state.stage.config.max_grad_norm, gradient_norm(state)
    found = norm.item()
    if max_norm and math.isfinite(found):
        state.gradients.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return found


def gradient_norm(state: TrainState) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in state.parameters.values() if p.grad is not None])


def zero_gradients(state: TrainState) -> None:
    """Set all gradients to zero, as views of ``state.gradients``."""
    state.gradients.zero_()
    for p in state.parameters.values():
        p.grad = state.gradients.as_strided(p.shape, p.stride(), p.storage_offset())


def warmup_largest_batch(state: TrainState) -> list[list[int]]:
    """Forward and backward of the largest possible micro-batches (that of the longest example, and the one of most tokens),
    without an update: what does not fit shows before the first step, and the plan adapts. Returns their examples."""
    objective = state.objective
    groups: list[list[int]] = []
    for attempt in objective.oom.attempts():
        zero_gradients(state)
        groups = largest_micro_batches(objective.data.lengths, state.stage.plan.micro_tokens)
        with attempt:
            for group in groups:
                forward_backward(state, group, state.total, objective.num_targets(group))
    zero_gradients(state)
    return groups


# What follows a step: numbers, logs, evaluation, checkpoints


def _check_numbers(state: TrainState) -> None:
    """Look at a step's metrics before its update: warn of a collapse; if it will be skipped, record it, and end the run after
    three in a row. A checkpoint from before the first skipped step is kept.

    Raises:
        UserError: three skipped steps in a row.
    """
    step, skipped, metrics, collapse = state.step + 1, state.skipped, state.metrics, state.objective.collapse
    # the scale after the overflow
    scale = state.scaler.get_scale() * state.scaler.get_backoff_factor() if state.scaler.is_enabled() else None
    kind = skipped.kind(metrics, scale)
    if kind == "bad" and state.before_skips is None:
        state.before_skips = state.step
        if state.step:
            _save_once(state)
    skipped.count_step(kind)
    if kind == "applied":
        state.before_skips = None
        if collapse is not None and (warning := collapse.saw(step, metrics)):
            logger.warning(warning)
            state.warnings.append(warning)
    elif kind == "searching":
        logger.warning(
            f"step {step}: a gradient was too large for the loss scale, which is now {scale:g}: step left out."
        )
    else:
        rows, alone = world().broadcast(lambda: _rows_not_finite(state))
        kept = f"checkpoint-{state.before_skips} has the adapter from before." if state.before_skips else ""
        error = skipped.add(step, metrics, rows, kept, alone=alone)
        if error is not None:
            raise everywhere(error)


def _rows_not_finite(state: TrainState) -> tuple[list[str], bool]:
    """The rows of a step whose own loss or gradients are not finite, and True; or all its rows and False."""
    objective, examples = state.objective, examples_of_step(state, state.step)
    total = objective.num_targets(examples)
    found: list[int] = []
    for attempt in objective.oom.attempts():
        found.clear()
        with attempt:
            for example in examples:
                zero_gradients(state)
                loss, _ = objective.loss([example], state.step, total)
                loss.backward()  # without the loss scale
                if not (loss.isfinite() and gradient_norm(state).isfinite()):
                    found.append(example)
    zero_gradients(state)
    return [objective.data.examples[example].where for example in found or examples], bool(found)


def _log(state: TrainState, metrics: Metrics) -> None:
    state.log.append({"step": state.step, **metrics})
    state.observers.tell("on_log", state.step, metrics)


def _evaluate(state: TrainState, stop: StopRequest) -> None:
    """Evaluate on the held-out rows if that is due, and draw samples.

    Raises:
        Interrupted: a signal came during the evaluation; a resumed run makes it first.
    """
    step, every = state.step, state.stage.config.eval_steps
    if state.stage.eval_data is None or (step != state.total and not (every and step % every == 0)):
        return
    sums: Any = None
    with suppress(KeyboardInterrupt), stop.at_once():
        sums = state.objective.evaluate()
    parts = world().all_gather(sums)
    if None in parts:
        signal, _ = _asked_to_stop(state, stop)
        save(state, pending=True)
        raise interrupted(signal, state.stage.dir, step, state.total)
    found = state.objective.eval_metrics(sum_by_name(parts))
    state.evaluations.append({"step": step, **found})
    _log(state, found)
    loss = found["eval_loss"]
    if not math.isfinite(loss):
        logger.warning(f"step {step}: the held-out loss is not finite; it counts as one that did not improve.")
    if math.isfinite(loss) and (state.best is None or loss < state.best[0]):
        state.best, state.stale = (loss, step), 0
    else:
        state.stale += 1
    state.observers.tell("on_evaluate", step, found)
    _sample(state, stop)


def _sample(state: TrainState, stop: StopRequest) -> None:
    """Answer the held-out prompts, unless the log has this step's answers already; a signal ends it before the last step."""
    stage = state.stage
    if state.step in state.sampled or not stage.writes or stage.eval_data is None or not stage.config.samples:
        return
    from .samples import draw_samples  # the chat room, which a run without samples does not need

    samples: list[Sample] | None = None
    last = state.step == state.total  # the stage is completed after these, so that no later start would draw them
    with suppress(KeyboardInterrupt), nullcontext() if last else stop.at_once():  # ``stop`` remembers it
        samples = draw_samples(stage, state.step)
    if samples is None:
        return
    for sample in samples:
        state.sample_log.append(asdict(sample))
    state.sampled.add(state.step)
    if samples:
        state.observers.tell("on_sample", state.step, samples)


def _asked_to_stop(state: TrainState, stop: StopRequest) -> tuple[str | None, OSError | None]:
    """The signal that came to any process, and the error of any that cannot print any more. All processes call it at the same
    points, and get the same answer."""
    signal, fault = None, None
    for name, error in world().all_gather((stop.name, state.observers.fault)):
        signal, fault = signal or name, fault or error
    return signal, fault


def _save_once(state: TrainState) -> None:
    if not (state.stage.dir.path / f"checkpoint-{state.step}").is_dir():
        save(state)


def _save_if_due(state: TrainState, stop: StopRequest) -> None:
    """Write a checkpoint after a step, if one is due, and stop if that was asked for.

    Raises:
        Interrupted: a signal came.
        OSError: nothing can be printed any more.
    """
    config, step, last = state.stage.config, state.step, state.step == state.total
    # while steps are skipped, the newest checkpoint stays the one from before
    periodic = config.save_steps and step % config.save_steps == 0 and state.before_skips is None
    is_best = state.best is not None and state.best[1] == step and config.load_best_model_at_end
    signal, fault = _asked_to_stop(state, stop)
    if last or periodic or is_best or signal is not None or fault is not None:
        save(state)
        state.observers.tell("on_save", step)
    if signal is not None and not last:  # after the last step the stage is completed first
        raise interrupted(signal, state.stage.dir, step, state.total)
    if fault is not None and not last:
        raise fault


def interrupted(signal: str | None, stage: StageDir, step: int, total: int) -> Interrupted:
    """The exception that ends a run after a signal."""
    return Interrupted(
        f"{signal}: stopped after step {step} of {total}; {stage.path / f'checkpoint-{step}'} holds everything. "
        "The same command continues from there."
    )
