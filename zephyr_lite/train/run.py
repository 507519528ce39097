"""What both stages do around their losses: alone on the run's folder, on the engine that was asked for, copied elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..config import Loaded, Method
from ..errors import Interrupted
from ..lock import alone
from ..sync import kept_elsewhere
from .loop import Loop
from .observer import Observer, Observers
from .samples import draw_samples
from .setup import close_stage, open_stage
from .stage import Say, Stage
from .task import Metrics, Outcome, Task
from .watch import CollapseWatch

OnMetrics = Callable[[int, int, Metrics], None]


def run(
    method: Method,
    loaded: Loaded,
    train: Callable[..., Outcome],
    *,
    say: Say,
    on_metrics: OnMetrics,
    observers: Sequence[Observer] = (),
) -> Outcome:
    """Open a stage and train it, from its last checkpoint if there is one.

    Args:
        train: of the fused engine: is given the opened stage.
        observers: are told what happens.
    """
    with alone(Path(loaded.config.output_dir), say):
        if loaded.config.engine != "fused":
            from .baselines import run_baseline

            return run_baseline(method, loaded, say=say, on_metrics=on_metrics, observers=observers)
        return train(open_stage(method, loaded, say=say), say=say, on_metrics=on_metrics, observers=observers)


def train(
    stage: Stage,
    task: Task,
    *,
    say: Say,
    on_metrics: OnMetrics,
    observers: Sequence[Observer] = (),
    collapse: CollapseWatch | None = None,
) -> Outcome:
    """Train an opened stage and write its adapter.

    Args:
        observers: are told what happens.
        collapse: watches over a preference optimization.
    """
    watching = Observers(observers)
    loop = Loop(
        stage.config,
        stage.dir,
        stage.stack,
        task,
        stage.plan,
        fp16=str(stage.base.dtype) == "torch.float16",
        on_metrics=on_metrics,
        observer=watching,
        begun=lambda step: watching.begins(stage, task.unit, loop.total, step),
        draw=lambda step: draw_samples(stage, step),
        collapse=collapse,
        mirror=stage.mirror,
        forget_best=stage.forget_best,
        say=say,
    )
    with kept_elsewhere(stage.mirror):
        outcome = loop.run()
        close_stage(stage, outcome, say=say)
        watching.ends(stage, outcome)
        stopped_at_the_end(stage, outcome)
    return outcome


def stopped_at_the_end(stage: Stage, outcome: Outcome) -> None:
    """Raises:
    Interrupted: a signal came during the last step. The stage is complete; whoever goes on from here must not.
    """
    if outcome.stopped is not None:
        raise Interrupted(
            f"{outcome.stopped}: it came at the end; {stage.dir.path} is complete, and nothing else was begun."
        )
