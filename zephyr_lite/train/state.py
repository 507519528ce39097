"""The state of a run: in memory, and in checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..io.interrupts import Output
from .checkpoint import Checkpoint, MetricsLog, checkpoint_fault, prune, resume_point
from .distributed import world
from .monitors import SkippedSteps
from .objective import Metrics, Objective
from .observer import Observer
from .optim import make_optimizer, make_scheduler
from .stage import Stage
from .steps import step_schedule

logger = logging.getLogger(__name__)

OnMetrics = Callable[[int, int, Metrics], None]


@dataclass
class TrainState:
    """A run in progress.

    Attributes:
        stage, objective: what is trained.
        parameters: the adapter's float32 weights, by name.
        optimizer, scheduler, scaler: of these weights; the scaler is disabled but for float16.
        per_epoch, total: steps of an epoch, and of the run.
        on_metrics: prints a logged step.
        observers: are told of steps, evaluations and samples.
        callbacks: transformers' callbacks beside the trackers of ``report_to``.
        output: knows whether anything can still be printed.
        log, sample_log, skipped: the stage's JSON lines.
        step: optimizer steps done.
        metrics: of the last step.
        evaluations: metrics of every evaluation so far.
        sampled: steps at which samples were drawn.
        best, stale: the lowest eval_loss with its step, and evaluations since.
        warnings: printed about the run's numbers.
        before_skips: while steps are being skipped, the step of the checkpoint from before the first of them.
        gradients: with several processes, all gradients in one tensor, which one all-reduce sums in place.
    """

    stage: Stage
    objective: Objective
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    per_epoch: int
    total: int
    on_metrics: OnMetrics
    observers: Sequence[Observer]
    callbacks: Sequence[TrainerCallback]
    output: Output
    log: MetricsLog
    sample_log: MetricsLog
    skipped: SkippedSteps
    step: int = 0
    metrics: Metrics = field(default_factory=dict)
    evaluations: list[Metrics] = field(default_factory=list)
    sampled: set[int] = field(default_factory=set)
    best: tuple[float, int] | None = None
    stale: int = 0
    warnings: list[str] = field(default_factory=list)
    before_skips: int | None = None
    gradients: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.stage.base.device

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.parameters, self.optimizer, self.scheduler, self.scaler)


def init_state(
    stage: Stage,
    objective: Objective,
    *,
    on_metrics: OnMetrics = lambda step, total, metrics: None,
    observers: Sequence[Observer] = (),
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainState:
    """The state before the first step, with the optimizer's state allocated (see ``TrainState`` for the arguments)."""
    output = Output()
    parameters = stage.stack.parameters()
    optimizer = make_optimizer(stage.config, parameters)
    per_epoch, total = step_schedule(stage.config, len(stage.data.rows))
    return TrainState(
        stage=stage,
        objective=objective,
        parameters=parameters,
        optimizer=optimizer,
        scheduler=make_scheduler(stage.config, optimizer, total),
        scaler=torch.amp.GradScaler(stage.base.device.type, enabled=stage.base.dtype == torch.float16),
        per_epoch=per_epoch,
        total=total,
        on_metrics=output.of(on_metrics),
        observers=observers,
        callbacks=callbacks,
        output=output,
        log=MetricsLog(stage.dir.metrics, writes=stage.writes),
        sample_log=MetricsLog(stage.dir.samples, writes=stage.writes),
        skipped=SkippedSteps(stage.dir.path, writes=stage.writes),
    )


def is_saved(state: TrainState, step: int) -> bool:
    return world().lead((state.stage.dir.path / f"checkpoint-{step}").is_dir)


def save(state: TrainState, *, pending: bool = False) -> None:
    """Write a checkpoint, then delete older ones. The logs are on the disk before it is.

    Args:
        pending: this step's evaluation was not finished.
    """

    def write() -> None:
        for log in (state.log, state.skipped.log, state.sample_log):
            log.flush()
        collapse = state.objective.collapse
        state.checkpoint.write(
            state.stage.dir,
            state.step,
            {
                "best": state.best,
                "stale": state.stale,
                "total": state.total,
                "pending": pending,
                "finite": state.skipped.state(),
                "collapse": collapse.state() if collapse is not None else None,
                "warnings": state.warnings,
            },
        )
        _prune(state)
        if state.stage.mirror is not None:
            state.stage.mirror.changed(state.best[1] if state.best else None)

    world().together(write if state.stage.writes else lambda: None)


def _prune(state: TrainState) -> None:
    busy = state.stage.mirror.busy() if state.stage.mirror is not None else frozenset()
    if state.before_skips is not None:
        busy |= {f"checkpoint-{state.before_skips}"}
    best = state.best[1] if state.best else None
    prune(state.stage.dir, keep=state.stage.config.save_total_limit, best=best, busy=busy)


def resume(state: TrainState) -> bool:
    """Restore the newest checkpoint, if there is one, and what was logged up to it; returns whether its evaluation is due."""
    stage, here = state.stage, world()
    found = here.lead(lambda: resume_point(stage.dir))
    forget_best = here.lead(lambda: stage.forget_best)
    extra: dict[str, Any] = {}
    if found is not None:
        extra = here.together(lambda: state.checkpoint.read(found))
        assert extra["total"] == state.total, f"{found}: written by a run of {extra['total']} steps, not {state.total}"
        if not forget_best:
            best = extra["best"]
            state.best = (float(best[0]), int(best[1])) if best else None
            state.stale = extra["stale"]
        state.step = extra["step"]
        state.skipped.load(extra.get("finite") or {})
        if state.skipped.in_a_row:  # it was stopped among skipped steps
            state.before_skips = state.step
        if state.objective.collapse is not None:
            state.objective.collapse.load(extra.get("collapse") or {})
        state.warnings = list(extra.get("warnings") or [])
        logger.info(f"going on from {found.name}")
        if stage.writes:
            _prune(state)  # the last process may have been killed between a checkpoint and this
    pending = bool(extra.get("pending"))
    state.skipped.log.truncate(state.step)
    state.sampled = {record["step"] for record in state.sample_log.truncate(state.step)}
    records = state.log.truncate(state.step, pending=pending)
    state.evaluations = [record for record in records if "eval_loss" in record]
    trained = [record for record in records if "loss" in record]
    state.metrics = {k: v for k, v in trained[-1].items() if k != "step"} if trained else {}
    return pending


def restore_best(state: TrainState) -> None:
    assert state.best is not None
    folder = state.stage.dir.path / f"checkpoint-{state.best[1]}"
    if (fault := checkpoint_fault(folder)) is not None:
        warning = f"{folder.name}, the best, cannot be taken ({fault}); the adapter is the last step's."
        logger.warning(warning)
        state.warnings.append(warning)
        return
    state.checkpoint.read_adapter(folder)
    logger.info(f"took the adapter of step {state.best[1]}, eval_loss {state.best[0]:.4f}")
