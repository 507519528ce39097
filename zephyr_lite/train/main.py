"""A run of one stage: lock its folder, set it up, train, save, publish; and ``sync`` on the way."""

from __future__ import annotations

import logging
import socket
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from ..config.load import Loaded, Method, RunConfig
from ..errors import Interrupted, UserError, optional
from ..io.atomic import alone, folder_aside
from ..io.run_dir import StageDir
from ..io.sync import Mirror
from ..memory.gpus import in_words
from ..memory.machine import THE_CPU, add_run, peak_memory
from ..model.peft_io import LoraWeights, adapter_sha256, compose, read_adapter, write_adapter
from ..model.tokenizer import save_tokenizer
from .distributed import everywhere, world
from .general import measure_general_loss
from .loop import TrainState, train
from .resume import StageComplete, machine_now, utc_now
from .setup import setup_stage
from .stage import Objective, Observer, Observers, Outcome, Stage

logger = logging.getLogger(__name__)
# a run of fewer does not tell how fast a machine is
FEWEST_STEPS = 10
# a speed that is wrong by such a factor was measured while other processes had the machine
DISTURBED = 4
OVERFIT = 0.05  # nats of the last held-out loss above the lowest one


def run(
    method: Method, objective: Callable[[Stage], Objective], loaded: Loaded, *, observers: Sequence[Observer] = ()
) -> Outcome:
    """Train the stage of a configuration, from its last checkpoint if there is one, and write its adapter.

    Args:
        objective: makes the method's objective of a stage.
        observers: are told of steps, evaluations and samples, by the process that writes.

    Raises:
        StageComplete: the stage is finished.
        Interrupted: a signal came; there is a checkpoint, or the stage is complete.
        PeerEnded: another process ended.
    """
    here, config = world(), loaded.config
    if here.size > 1 and config.engine != "fused":
        refused = f"engine {config.engine} runs in one process; {here.size} were started."
        raise everywhere(UserError(refused, "Take engine=fused, or start it without torchrun."))
    if not here.is_main_process:
        observers = ()
    with ExitStack() as held:
        here.broadcast(lambda: held.enter_context(alone(Path(config.output_dir))))
        if config.engine != "fused":
            with optional("trl"):
                from ..engines.trl import check_supported, train_on_trl
            check_supported(method, config)
        if here.size > 1:
            logger.info(
                f"{here.size} processes: each takes its share of every step (the plan and its hours are for one alone)"
            )
            hosts = here.all_gather((socket.gethostname(), Path(config.output_dir).is_dir()))
            if blind := sorted({host for host, there in hosts if not there}):
                hint = "All machines need the run's folder, the data and the base at the same paths: use a shared disk."
                raise everywhere(UserError(f"{config.output_dir}: does not exist on {', '.join(blind)}.", hint))
        try:
            stage = here.main_process_first(lambda: setup_stage(method, loaded))
        except StageComplete:
            if here.is_main_process:
                done = StageDir(Path(config.output_dir) / config.stage)
                if config.sync is not None:
                    Mirror(config.sync, done).finish()  # the network may have been away at the stage's end
                push_adapter(config, done)
            raise
        if config.sync is not None and stage.writes:
            stage.mirror = held.enter_context(Mirror(config.sync, stage.dir))
        own: dict[str, LoraWeights] | None = None
        if config.engine != "fused":
            outcome, own = train_on_trl(stage, observers)
        else:
            if config.report_to and here.is_main_process:
                from .callbacks import Callbacks, trackers

                observers = [*observers, Callbacks(trackers(config))]
            outcome = train(TrainState(stage, objective(stage), observers=observers))
            # several epochs that were chosen for few rows are meant to change the model
            warns = "num_train_epochs" not in loaded.automatic or stage.config.num_train_epochs <= 1
            measure_general_loss(stage, outcome, warns=warns)
        warn_of_overfitting(stage, outcome)
        if stage.writes:
            save_stage(stage, outcome, own)
        told = Observers(observers)
        told.tell("on_train_end", stage, outcome)
        if outcome.stopped is not None:
            raise Interrupted(
                f"{outcome.stopped}: it came at the end; {stage.dir.path} is complete, and nothing else was begun."
            )
        if told.fault is not None:
            raise told.fault
        return outcome


def save_stage(stage: Stage, outcome: Outcome, own: dict[str, LoraWeights] | None = None) -> None:
    """Write what people load: the stage's own adapter, the whole chain as one, the tokenizer; then mark it complete.

    Args:
        own: the trained adapter's weights, where another engine holds them; None: the stack's.
    """
    own = stage.stack.weights(stage.config.stage) if own is None else own
    options: dict[str, Any] = {
        "base_model_name": stage.config.model_name_or_path,
        "extra_config": {"revision": stage.config.model_revision},
    }
    chain: Mapping[str, LoraWeights] = own
    if stage.frozen:
        write_adapter(stage.dir.delta, own, rslora=stage.config.use_rslora, **options)
        chain = compose([*stage.frozen, read_adapter(stage.dir.delta)])
    with folder_aside(stage.dir.adapter) as folder:
        # a composed adapter has scale 1
        write_adapter(folder, chain, rslora=stage.config.use_rslora and chain is own, **options)
        save_tokenizer(stage.template.tokenizer, folder)
    peak, speed, seconds = peak_memory(stage.base.device), None, outcome.step_seconds
    if seconds and stage.workload.step_tokens:
        # kernels are compiled in the first step
        speed = round(stage.workload.step_tokens / statistics.median(seconds[1:] or seconds), 2)
    stage.info.update(
        status="complete",
        own={"path": stage.dir.own.name, "sha256": adapter_sha256(stage.dir.own)},
        adapter_sha256=adapter_sha256(stage.dir.adapter),
        result={
            "steps": outcome.step,
            "metrics": outcome.metrics,
            "evaluations": outcome.evaluations,
            "best": outcome.best,
            "seconds": round(outcome.seconds, 2),
            "steps_left_out": outcome.skipped,
            "warnings": outcome.warnings,
            "general_loss": outcome.general_loss,
            "peak_memory_bytes": peak,
            "tokens_per_second": speed,
        },
        finished=utc_now(),
    )
    stage.dir.write_info(stage.info)
    if speed is not None and len(seconds) >= FEWEST_STEPS:
        _compare(stage, speed, peak)
    logger.info(f"{stage.dir.adapter} holds the adapter" + (" (the whole chain in one)" if stage.frozen else ""))
    push_adapter(stage.config, stage.dir)


def warn_of_overfitting(stage: Stage, outcome: Outcome) -> None:
    """Warn if the adapter of the last step is saved, and an earlier one had a clearly lower held-out loss."""
    if stage.method != "sft" or outcome.best is None or stage.config.load_best_model_at_end:
        return
    lowest, step = outcome.best
    last = outcome.evaluations[-1]["eval_loss"]
    if last > lowest + OVERFIT:
        outcome.warn(
            f"the held-out loss was lowest at step {step:,} ({lowest:.3f}) and is {last:.3f} at the end: the model learns these "
            "rows by heart. Fewer epochs or more rows may help; load_best_model_at_end=true saves that step's adapter."
        )


def _compare(stage: Stage, speed: float, peak: int) -> None:
    """Record how fast a run was for the next plan on this machine, and warn if it took more memory than planned."""
    plan, info, now, cuda = stage.plan, stage.info, machine_now(stage.base.dtype), stage.base.device.type == "cuda"
    machines = [told.get("machine") for told in (info, *(info.get("resumed") or []))]
    # a plan made on another machine, for one of several processes or after memory ran out does not predict this speed
    if not plan.tokens_per_second or now["processes"] > 1 or any(machine != now for machine in machines):
        return
    ratio = speed / plan.tokens_per_second * plan.speed_ratio
    if 1 / DISTURBED < ratio < DISTURBED:
        with suppress(OSError, UserError):  # the stage is complete, even if the cache cannot be written
            add_run(now["processor"] if cuda else THE_CPU, stage.workload, ratio)
    if cuda and stage.config.engine == "fused" and peak > plan.peak:
        logger.warning(f"memory: {in_words(peak)} at the peak, more than the {in_words(plan.peak)} of the plan")


def push_adapter(config: RunConfig, stage: StageDir) -> None:
    """``push_to_hub``: upload ``adapter/`` of a complete stage, unless stage.json says that this adapter was pushed there.

    Raises:
        UserError: the upload failed; the stage stays complete, and the same command tries again.
    """
    info = stage.info() or {}
    pushed = {"repo": config.push_to_hub, "sha256": info.get("adapter_sha256")}
    if not config.push_to_hub or info.get("pushed") == pushed:
        return
    api = HfApi()
    try:
        # a name without its owner, as in the handbook's recipes, is completed by the hub
        repo = api.create_repo(config.push_to_hub, private=config.hub_private_repo or None, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo, folder_path=stage.adapter)
    except (HTTPError, OSError, ValueError) as error:  # the hub's own errors are kinds of these
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"push_to_hub {config.push_to_hub}: {what}",
            f"The stage is complete, and its adapter is in {stage.adapter}. Log in (hf auth login) or check the connection; "
            "the same command then pushes it.",
        ) from None
    stage.write_info({**info, "pushed": pushed})
    logger.info(f"pushed to {config.push_to_hub}")
