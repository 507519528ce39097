"""What both stages do around their losses: alone on the run's folder, on the engine that was asked for, copied elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ..config.load import Loaded, Method
from ..errors import Interrupted, UserError
from ..io.lock import alone
from ..io.sync import kept_elsewhere
from .distributed import World, everywhere, nothing, sees, world
from .leader import Leader
from .loop import Loop
from .monitors import DpoCollapseMonitor
from .objective import Metrics, Objective, Outcome
from .observer import Observer, Observers
from .samples import draw_samples
from .setup import save_stage, setup_stage
from .stage import Say, Stage

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
    here = world()
    if here.size > 1:
        return _among_others(here, method, loaded, train, say=say, on_metrics=on_metrics, observers=observers)
    with alone(Path(loaded.config.output_dir)):
        if loaded.config.engine != "fused":
            from ..engines import run_baseline

            return run_baseline(method, loaded, say=say, on_metrics=on_metrics, observers=observers)
        return train(setup_stage(method, loaded, say=say), say=say, on_metrics=on_metrics, observers=observers)


def _among_others(
    here: World,
    method: Method,
    loaded: Loaded,
    train: Callable[..., Outcome],
    *,
    say: Say,
    on_metrics: OnMetrics,
    observers: Sequence[Observer],
) -> Outcome:
    """As ``run``, in one of several processes: the writer opens the stage, and the others what it has opened.

    Raises:
        UserError: another engine; a machine does not see the run's folder; as ``Leader.agrees``.
        PeerEnded: another process ended.
    """
    config = loaded.config
    if config.engine != "fused":
        raise everywhere(
            UserError(
                f"engine {config.engine} runs in one process; {here.size} were started.",
                "Take engine=fused, or start it without torchrun.",
            )
        )
    with ExitStack() as held:
        if here.writes:  # its lock is the run's
            here.together(lambda: held.enter_context(alone(Path(config.output_dir))))
            say(
                f"{here.size} processes, {here.local_size} of them on this machine: each takes its share of every step "
                "(the plan and its hours are for one alone)"
            )
        else:
            here.together(lambda: None)
        sees(config.output_dir)
        opened: list[Stage] = []

        def lead() -> Leader:
            opened.append(setup_stage(method, loaded, say=say))
            return Leader.of(opened[0])

        leader = here.lead(lead)
        if not here.writes:
            quiet = config.model_copy(update={"report_to": [], "sync": None, "push_to_hub": None})
            loaded = replace(loaded, config=quiet, notes=[])

        def follow() -> Stage:
            return opened[0] if opened else setup_stage(method, loaded, say=nothing, claim=False, leader=leader)

        stage = here.in_turn(follow)
        if here.writes:
            return train(stage, say=say, on_metrics=on_metrics, observers=observers)
        return train(stage, say=nothing, on_metrics=lambda step, total, metrics: None)


def train(
    stage: Stage,
    task: Objective,
    *,
    say: Say,
    on_metrics: OnMetrics,
    observers: Sequence[Observer] = (),
    collapse: DpoCollapseMonitor | None = None,
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
        writes=stage.writes,
        fp16=str(stage.base.dtype) == "torch.float16",
        on_metrics=on_metrics,
        observer=watching,
        begun=lambda step: watching.begins(stage, task.unit, loop.total, step),
        draw=lambda step: draw_samples(stage, step, say),
        collapse=collapse,
        mirror=stage.mirror,
        forget_best=stage.forget_best,
        say=say,
    )
    with kept_elsewhere(stage.mirror):
        outcome = loop.run()
        world().together(lambda: save_stage(stage, outcome, say=say) if stage.writes else None)
        if stage.writes:
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
