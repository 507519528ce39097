"""transformers' callbacks and trackers around the loop."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from ..config.load import RunConfig
from ..errors import UserError
from ..io.run_dir import StageDir
from .distributed import world

# Trackers that an extra of ours installs, and the packages of which one has to be there.
EXTRAS = {
    "tensorboard": ("trackers", ("tensorboard", "tensorboardX")),
    "wandb": ("wandb", ("wandb",)),
    "trackio": ("trackio", ("trackio",)),
}


def trackers(config: RunConfig) -> list[type[TrainerCallback]]:
    """The callbacks of ``report_to``: transformers' own, which send every logged step, every evaluation and their own view of
    the configuration.

    Raises:
        UserError: transformers knows no such tracker, or it is not installed.
    """
    for name in config.report_to:
        extra, packages = EXTRAS.get(name, ("", ()))
        if extra and not any(_installed(package) for package in packages):
            raise UserError(
                f"report_to: {name} is not installed.", f'Run: pip install "zephyr-lite[{extra}]", or leave it out.'
            )
    try:
        return list(get_reporting_integration_callbacks(config.report_to))
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"report_to {config.report_to}: {error}", "Install the tracker, or leave it out.") from None


def _installed(package: str) -> bool:
    """A package that can be imported; a folder of its name, which a tracker leaves where it ran, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def open_wandb(reporting: Sequence[type[TrainerCallback]], stage: StageDir) -> None:
    """Begin the stage's W&B run, or continue it: its id is made of the run's, which stage.json keeps. transformers' callback
    takes the run that is open."""
    info = stage.info()
    if not any(cls.__name__ == "WandbCallback" for cls in reporting) or not info or not world().writes:
        return
    import wandb

    if wandb.run is None:
        wandb.init(
            project=os.getenv("WANDB_PROJECT", "huggingface"),
            name=f"{stage.run.name}-{stage.path.name}",
            id=os.getenv("WANDB_RUN_ID") or f"{info['id']}-{stage.path.name}",
            resume=os.getenv("WANDB_RESUME") or "allow",
        )


def make_callbacks(
    config: RunConfig,
    stage: StageDir,
    model: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    total: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[CallbackHandler, TrainerState, TrainerControl, TrainingArguments]:
    """What transformers' Trainer would call them with.

    Args:
        total: steps of the run.
        callbacks: beside the trackers of ``report_to``.

    Raises:
        UserError: a tracker is not installed.
    """
    # transformers' integrations read their settings from its own arguments, and send these to the tracker
    arguments = TrainingArguments(
        output_dir=str(stage.path),
        report_to=config.report_to or "none",
        logging_steps=config.logging_steps,
        run_name=f"{stage.run.name}-{stage.path.name}",
        project="zephyr-lite",  # trackio's; wandb reads its own variable
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=config.num_train_epochs,
        max_steps=total,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        save_strategy="no",  # the loop saves and evaluates by itself
        eval_strategy="no",
    )
    try:
        open_wandb(trackers(config), stage)
        reporting = [cls() for cls in trackers(config)]
    except (ImportError, RuntimeError) as error:  # some look for their library only now
        raise UserError(f"report_to {config.report_to}: {error}", "Install the tracker, or leave it out.") from None
    handler = CallbackHandler([DefaultFlowCallback(), *reporting, *callbacks], model, None, optimizer, scheduler)
    state = TrainerState(max_steps=total, num_train_epochs=math.ceil(config.num_train_epochs))
    state.is_local_process_zero = state.is_world_process_zero = True
    return handler, state, TrainerControl(), arguments
