"""A run of one stage: lock its folder, set it up, train, save; and ``sync`` on the way."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from ..config.load import Loaded, Method
from ..errors import Interrupted, UserError
from ..io.lock import alone
from ..io.sync import kept_elsewhere
from ..model.peft_io import LoraWeights
from .distributed import everywhere, world
from .loop import OnMetrics, TrainState, train
from .save import save_stage
from .setup import setup_stage
from .stage import Objective, Observer, Outcome, Stage

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
    if not here.is_main_process:
        on_metrics, observers = lambda step, total, metrics: None, ()
    with ExitStack() as held:
        here.broadcast(lambda: held.enter_context(alone(Path(config.output_dir))))
        if config.engine != "fused":
            from ..engines.trl import check_supported, train_on_trl

            check_supported(method, config)
        if here.size > 1:
            logger.info(
                f"{here.size} processes, {here.local_size} of them on this machine: each takes its share of every step "
                "(the plan and its hours are for one alone)"
            )
            hosts = here.all_gather((socket.gethostname(), Path(config.output_dir).is_dir()))
            if blind := sorted({host for host, there in hosts if not there}):
                raise everywhere(
                    UserError(
                        f"{config.output_dir}: does not exist on {', '.join(blind)}.",
                        "All machines need the run's folder, the data and the base at the same paths: use a shared disk.",
                    )
                )
        stage = here.main_process_first(lambda: setup_stage(method, loaded))
        held.enter_context(kept_elsewhere(stage.mirror))
        own: dict[str, LoraWeights] | None = None
        if config.engine != "fused":
            outcome, own = train_on_trl(stage, on_metrics=on_metrics, observers=observers)
        else:
            outcome = train(TrainState(stage, objective(stage), on_metrics=on_metrics, observers=observers))
        if stage.writes:
            save_stage(stage, outcome, own=own)
        for observer in observers:
            observer.on_train_end(stage, outcome)
        if outcome.stopped is not None:
            raise Interrupted(
                f"{outcome.stopped}: it came at the end; {stage.dir.path} is complete, and nothing else was begun."
            )
        return outcome
