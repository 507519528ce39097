"""The training loop that SFT and DPO share.

One step is ``batch_size`` rows of the recipe (packed rows, or pairs), run in as many micro-batches as the plan says. Losses
are divided by the step's own number of targets, so neither the split nor a last partial step changes a gradient.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import Interrupted, UserError
from ..io.interrupts import StopRequest
from ..io.run_dir import StageDir
from ..memory.machine import peak_memory, reset_peak_memory
from ..model.adapters import total_norm
from .callbacks import Callbacks
from .distributed import PeerEnded, everywhere, world
from .monitors import IN_A_ROW
from .objective import Metrics, Outcome
from .oom import is_out_of_memory
from .samples import draw_samples
from .state import TrainState, is_saved, restore_best, resume, save
from .steps import largest_micro_batches, micro_batches, rows_of_step, tokens_of_largest_step

logger = logging.getLogger(__name__)


def train(state: TrainState) -> Outcome:
    """Train from the last checkpoint, or from the start, to the end.

    Raises:
        Interrupted: a signal came; the step was finished, and there is a checkpoint of it.
        UserError: loss or gradients were not finite three steps in a row (the loss scaler's search aside); an example does
            not fit into memory under any plan; memory ran out during an update.
    """
    stage, config = state.stage, state.stage.config
    torch.set_num_threads(stage.plan.threads)
    reset_peak_memory(state.device)
    state.objective.oom.record()
    callbacks = Callbacks(
        config, stage.dir, stage.stack.model, state.optimizer, state.scheduler, state.total, state.callbacks
    )
    with StopRequest("the step is finished and a checkpoint written") as stop:
        with stop.at_once():
            evaluation_due = resume(state)
            callbacks.state.global_step, callbacks.state.epoch = state.step, state.step / state.per_epoch
            if state.device.type == "cuda":
                warmup_largest_batch(state)
            callbacks("on_train_begin")
        started, patience = time.perf_counter(), config.early_stopping_patience
        for observer in state.observers:
            observer.on_train_begin(stage, state.objective.unit, state.total, state.step)
        if state.step == 0 or any(record["step"] == state.step for record in state.evaluations):
            _sample(state, stop)  # again, if a signal interrupted it
        if evaluation_due:
            _evaluate(state, callbacks, stop)
            _save_if_due(state, callbacks, stop)
        while state.step < state.total and not callbacks.control.should_training_stop:
            if patience is not None and state.stale >= patience:
                logger.info(
                    f"step {state.step}: eval_loss has not improved for {patience} evaluations; stopping early."
                )
                if not is_saved(state, state.step):
                    save(state)
                break
            begun = time.perf_counter()
            callbacks("on_step_begin")
            state.metrics = accumulate_gradients(state, state.step)
            _check_numbers(state)
            update(state, state.metrics)
            state.step += 1
            callbacks.state.global_step, callbacks.state.epoch = state.step, state.step / state.per_epoch
            callbacks("on_step_end")
            state.metrics["epoch"] = round(state.step / state.per_epoch, 4)
            state.metrics.update(_throughput(state, time.perf_counter() - begun))
            if state.step % config.logging_steps == 0 or state.step in (1, state.total):
                _log(state, callbacks, state.metrics)
            for observer in state.observers:
                observer.on_step_end(state.step, state.metrics)
            _evaluate(state, callbacks, stop)
            _save_if_due(state, callbacks, stop)
        callbacks("on_train_end")
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
        )


# One step


def examples_of_step(state: TrainState, step: int) -> list[int]:
    """Indices of the examples in a step's rows."""
    rows = state.objective.data.rows
    return [i for row in rows_of_step(state.stage.config, len(rows), step) for i in rows[row]]


def accumulate_gradients(state: TrainState, step: int) -> Metrics:
    """Everything of a step before its update: unscaled and clipped gradients are left on the parameters. Where memory runs
    out the forward and backward passes are done again under a smaller plan.

    Returns:
        the step's metrics; its update must not be applied if ``loss`` or ``grad_norm`` is not finite.
    """
    objective, here = state.objective, world()
    zero_gradients(state)
    with _failing_together():
        for attempt in objective.oom.attempts(lambda: zero_gradients(state)):
            with attempt:
                examples, lengths = examples_of_step(state, step), objective.data.lengths
                total = objective.num_targets(examples)
                sums: dict[str, Any] = {}
                for group in micro_batches(here.share(examples, lengths), lengths, state.stage.plan.micro_tokens):
                    for name, value in forward_backward(state, group, step, total).items():
                        sums[name] = sums.get(name, 0.0) + (value.double() if isinstance(value, Tensor) else value)
                sums = {name: float(value) for name, value in sums.items()}
    if here.size > 1:
        sums = here.sums(lambda: sums)
        assert state.gradients is not None
        here.add(state.gradients)
    metrics = objective.metrics(sums, total)
    metrics["grad_norm"] = clip_gradients(state)
    metrics["learning_rate"] = state.scheduler.get_last_lr()[0]
    return metrics


def forward_backward(state: TrainState, group: Sequence[int], step: int, total: int) -> dict[str, float | Tensor]:
    """Add the gradients of one micro-batch, times the loss scale.

    Args:
        group: indices of its examples.
        step: from 0.
        total: targets of the whole step.

    Returns:
        the micro-batch's sums for the metrics.
    """
    loss, sums = state.objective.loss(group, step, total)
    state.scaler.scale(loss).backward()
    return {"loss": loss.detach(), **sums}


def clip_gradients(state: TrainState) -> float:
    """Remove the loss scale from the gradients and clip them to ``max_grad_norm``; returns their norm before."""
    oom = state.objective.oom
    for attempt in oom.attempts():
        with attempt:
            state.scaler.unscale_(state.optimizer)
    for attempt in oom.attempts():
        with attempt:
            grads = [p.grad for p in state.parameters.values() if p.grad is not None]
            norm = total_norm(grads)
            found = norm.item()
            if math.isfinite(found):
                torch._foreach_mul_(grads, torch.clamp(state.stage.config.max_grad_norm / (norm + 1e-6), max=1.0))
    return found


def update(state: TrainState, metrics: Metrics) -> bool:
    """Change the adapter, unless loss or gradients are not finite; returns whether it was changed. The schedule advances
    either way, because it follows the rows.

    An update cannot be done again: what was changed already would change twice. The fused AdamW and bitsandbytes' kernels
    for GPUs allocate nothing; bitsandbytes on a CPU does.

    Args:
        metrics: of ``accumulate_gradients``.

    Raises:
        UserError: memory ran out.
    """
    applied = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
    if applied:
        try:
            state.optimizer.step()  # not through the scaler: the gradients are unscaled and finite
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"step {state.step + 1}: memory ran out while the adapter was being changed "
                f"({str(error).splitlines()[0]}).",
                "The last checkpoint is intact: start the same command again, and the run continues from it.",
            ) from None
    if state.scaler.is_enabled():
        state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.scheduler.step()
    return applied


def zero_gradients(state: TrainState) -> None:
    """Remove all gradients; with several processes set them to zero, as views of one tensor."""
    if world().size == 1:
        state.optimizer.zero_grad(set_to_none=True)
        return
    if state.gradients is None:
        first = next(iter(state.parameters.values()))
        count = sum(p.numel() for p in state.parameters.values())
        state.gradients = torch.zeros(count, dtype=first.dtype, device=first.device)
    state.gradients.zero_()
    start = 0
    for parameter in state.parameters.values():
        end = start + parameter.numel()
        parameter.grad = state.gradients[start:end].view_as(parameter)
        start = end


def warmup_largest_batch(state: TrainState) -> list[list[int]]:
    """Forward and backward of the largest possible micro-batches (that of the longest example, and the one of most tokens),
    without an update: what does not fit shows before the first step, and the plan adapts. If a step can have several
    micro-batches, gradients are allocated first, as they are for the later ones.

    Returns:
        the examples of each micro-batch.
    """
    objective = state.objective
    data, config = objective.data, state.stage.config
    for attempt in objective.oom.attempts(lambda: zero_gradients(state)):
        with attempt:
            tokens = state.stage.plan.micro_tokens
            groups = largest_micro_batches(data.lengths, tokens)
            zero_gradients(state)
            if world().size == 1 and tokens_of_largest_step(config, data.rows, data.lengths) > tokens:
                for parameter in state.parameters.values():
                    parameter.grad = torch.zeros_like(parameter)
            for group in groups:
                forward_backward(state, group, state.total, objective.num_targets(group))
    zero_gradients(state)
    return groups


@contextmanager
def _failing_together() -> Iterator[None]:
    """An error in the body, which exchanges nothing with other processes, ends those too."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if world().size == 1:
            raise
        world().together(partial(_raise, error))


def _raise(error: BaseException) -> None:
    raise error


# What follows a step: numbers, logs, evaluation, checkpoints


def _check_numbers(state: TrainState) -> None:
    """Look at a step's metrics before its update: warn of a collapse; if it will be skipped, record it, and end the run after
    three in a row. A checkpoint from before the first skipped step is kept.

    Raises:
        UserError: three skipped steps in a row.
    """
    step, skipped, metrics = state.step + 1, state.skipped, state.metrics
    finite = math.isfinite(metrics["loss"])
    applied = finite and math.isfinite(metrics["grad_norm"])
    # the scale after the overflow
    scale = state.scaler.get_scale() * state.scaler.get_backoff_factor() if state.scaler.is_enabled() else None
    kind = skipped.kind(applied=applied, finite_loss=finite, scale=scale)
    if kind == "bad" and state.before_skips is None:
        state.before_skips = state.step
        if state.step and not is_saved(state, state.step):
            save(state)
    skipped.count_step(kind)
    if kind == "applied":
        state.before_skips = None
        if state.objective.collapse is not None and (warning := state.objective.collapse.saw(step, metrics)):
            logger.warning(warning)
            state.warnings.append(warning)
    elif kind == "searching":
        logger.warning(
            f"step {step}: a gradient was too large for the loss scale, which is now {scale:g}: step left out."
        )
    else:
        rows, alone = world().lead(lambda: _rows_not_finite(state, state.step))
        named = skipped.add(step, metrics, rows, alone=alone)
        if skipped.in_a_row == IN_A_ROW:
            kept = f"checkpoint-{state.before_skips} has the adapter from before." if state.before_skips else ""
            raise everywhere(skipped.error(step, named, kept or "Nothing had been trained before."))


def _rows_not_finite(state: TrainState, step: int) -> tuple[list[str], bool]:
    """The rows of a step whose own loss or gradients are not finite, and True; or all its rows and False."""
    objective, examples = state.objective, examples_of_step(state, step)
    total = objective.num_targets(examples)

    def finite(example: int) -> bool:
        zero_gradients(state)
        loss, _ = objective.loss([example], step, total)
        loss.backward()
        norm = total_norm([p.grad for p in state.parameters.values() if p.grad is not None])
        return bool(torch.isfinite(loss.detach()) and torch.isfinite(norm))

    for attempt in objective.oom.attempts(lambda: zero_gradients(state)):
        with attempt:
            found = [example for example in examples if not finite(example)]
    zero_gradients(state)
    return [objective.data.examples[example].where for example in found or examples], bool(found)


def _throughput(state: TrainState, seconds: float) -> Metrics:
    unit = state.objective.unit
    return {
        "seconds": round(seconds, 4),
        f"{unit}_per_second": round(state.metrics.get(f"num_{unit}", 0.0) / max(seconds, 1e-9), 3),
        "peak_memory_gib": round(peak_memory(state.device) / 2**30, 3),
    }


def _log(state: TrainState, callbacks: Callbacks, metrics: Metrics) -> None:
    record = {"step": state.step, **metrics}
    state.log.append(record)
    callbacks.state.log_history.append(record)
    callbacks("on_log", dict(metrics))
    state.on_metrics(state.step, state.total, metrics)


def _evaluate(state: TrainState, callbacks: Callbacks, stop: StopRequest) -> None:
    """Evaluate on the held-out rows if that is due, and draw samples.

    Raises:
        Interrupted: a signal came during the evaluation; a resumed run makes it first.
    """
    step, every = state.step, state.stage.config.eval_steps
    if step != state.total and not (every and step % every == 0):
        return

    def sums() -> Metrics:
        with stop.at_once():
            return state.objective.evaluate()

    try:
        found = state.objective.eval_metrics(world().sums(sums))
    except (KeyboardInterrupt, PeerEnded) as error:
        if isinstance(error, PeerEnded) and not error.interrupted:
            raise
        name, _ = _asked_to_stop(state, stop)
        save(state, pending=True)
        raise interrupted(name, state.stage.dir, step, state.total) from None
    if not found:
        return
    state.evaluations.append({"step": step, **found})
    _log(state, callbacks, found)
    loss = found["eval_loss"]
    if not math.isfinite(loss):
        logger.warning(f"step {step}: the held-out loss is not finite; it counts as one that did not improve.")
    if math.isfinite(loss) and (state.best is None or loss < state.best[0]):
        state.best, state.stale = (loss, step), 0
    else:
        state.stale += 1
    for observer in state.observers:
        observer.on_evaluate(step, found)
    _sample(state, stop)
    callbacks("on_evaluate", found)


def _sample(state: TrainState, stop: StopRequest) -> None:
    """Answer the held-out prompts, unless the log has this step's answers already; a signal ends it."""
    if state.step in state.sampled or not state.stage.writes:
        return
    try:
        with stop.at_once():
            samples = draw_samples(state.stage, state.step)
    except KeyboardInterrupt:
        return  # ``stop`` remembers it
    for sample in samples:
        state.sample_log.append(sample.as_dict())
    state.sampled.add(state.step)
    if samples:
        for observer in state.observers:
            observer.on_sample(state.step, samples)


def _asked_to_stop(state: TrainState, stop: StopRequest) -> tuple[str | None, bool]:
    """The signal that came to any process, and whether any cannot print any more. All processes call it at the same points,
    and get the same answer."""
    found = world().gather((stop.name, state.output.fault is not None))
    return next((name for name, _ in found if name is not None), None), any(mute for _, mute in found)


def _save_if_due(state: TrainState, callbacks: Callbacks, stop: StopRequest) -> None:
    """Write a checkpoint after a step, if one is due, and stop if that was asked for.

    Raises:
        Interrupted: a signal came.
        OSError: nothing can be printed any more.
    """
    config, step, last = state.stage.config, state.step, state.step == state.total
    # while steps are skipped, the newest checkpoint stays the one from before
    periodic = config.save_steps and step % config.save_steps == 0 and state.before_skips is None
    is_best = state.best is not None and state.best[1] == step and config.load_best_model_at_end
    name, mute = _asked_to_stop(state, stop)
    if last or periodic or is_best or callbacks.control.should_save or name is not None or mute:
        save(state)
        callbacks("on_save")
    if name is not None and not last:  # after the last step the stage is completed first
        raise interrupted(name, state.stage.dir, step, state.total)
    if mute and not last:
        raise state.output.fault or PeerEnded("the process that prints cannot do so any more", 2)


def interrupted(signal: str | None, stage: StageDir, step: int, total: int) -> Interrupted:
    """The exception that ends a run after a signal."""
    return Interrupted(
        f"{signal}: stopped after step {step} of {total}; {stage.path / f'checkpoint-{step}'} holds everything. "
        "The same command continues from there."
    )
