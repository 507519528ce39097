"""A run of one stage: lock its folder, set it up, train, save; and ``sync`` on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from ..config.load import Loaded, Method
from ..errors import Interrupted, UserError
from ..io.atomic import alone
from ..io.sync import kept_elsewhere
from .distributed import everywhere, sees, world
from .loop import train
from .objective import Objective, Outcome
from .observer import Observer
from .setup import save_stage, setup_stage
from .stage import Stage
from .state import OnMetrics, init_state

logger = logging.getLogger(__name__)


def run(
    method: Method,
    objective: Callable[[Stage], Objective],
    loaded: Loaded,
    *,
    on_metrics: OnMetrics = lambda step, total, metrics: None,
    observers: Sequence[Observer] = (),
) -> Outcome:
    """Train the stage of a configuration, from its last checkpoint if there is one, and write its adapter.

    Args:
        objective: makes the method's objective of a stage.
        on_metrics: prints a logged step.
        observers: are told of steps, evaluations and samples. Only the process that writes prints and tells.

    Raises:
        StageComplete: the stage is finished.
        Interrupted: a signal came; there is a checkpoint, or the stage is complete.
        UserError: a user's mistake, or a machine does not see the run's folder.
        PeerEnded: another process ended.
    """
    here, config = world(), loaded.config
    if here.size > 1 and config.engine != "fused":
        raise everywhere(
            UserError(
                f"engine {config.engine} runs in one process; {here.size} were started.",
                "Take engine=fused, or start it without torchrun.",
            )
        )
    if not here.writes:
        on_metrics, observers = lambda step, total, metrics: None, ()
    with ExitStack() as held:
        here.together(lambda: held.enter_context(alone(Path(config.output_dir))) if here.writes else None)
        if config.engine != "fused":
            from ..engines.trl import check_supported, train_on_trl

            check_supported(method, config)
        if here.size > 1:
            logger.info(
                f"{here.size} processes, {here.local_size} of them on this machine: each takes its share of every step "
                "(the plan and its hours are for one alone)"
            )
            sees(config.output_dir)
        # the writer first: it checks, writes stage.json and fills the caches that the others read
        stage = here.in_turn(lambda: setup_stage(method, loaded))
        held.enter_context(kept_elsewhere(stage.mirror))
        if config.engine != "fused":
            outcome, own = train_on_trl(stage, on_metrics=on_metrics, observers=observers)
        else:
            state = init_state(stage, objective(stage), on_metrics=on_metrics, observers=observers)
            outcome, own = train(state), None
        here.together(lambda: save_stage(stage, outcome, own=own) if here.writes else None)
        for observer in observers:
            observer.on_train_end(stage, outcome)
        stopped_at_the_end(stage, outcome)
        return outcome


def stopped_at_the_end(stage: Stage, outcome: Outcome) -> None:
    """Raises:
    Interrupted: a signal came during the last step; the stage is complete, but no other may begin.
    """
    if outcome.stopped is not None:
        raise Interrupted(
            f"{outcome.stopped}: it came at the end; {stage.dir.path} is complete, and nothing else was begun."
        )
