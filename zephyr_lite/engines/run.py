"""A stage on TRL's trainers, from its opening to its adapter.

What is TRL's: losses, forward and backward, accumulation, gradient clipping, evaluation loop, checkpoints and resume.
Under ``engine: unsloth`` the model and its kernels are Unsloth's, and the trainers are TRL's as Unsloth patches them.
What is not: rows arrive tokenized and packed; the initial adapter, optimizer and schedule are the fused engine's; LoRA
weights are float32 (TRL casts them to bfloat16 on a 4-bit base, and its first DPO loss is then not ln 2).

Raises ``UserError`` for what TRL does not have: ``ipo_sum``, and label smoothing with ``sigmoid``, which it ignores.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerState
from trl import DPOConfig, SFTConfig

from ..config.load import Loaded, Method, RunConfig
from ..errors import UserError
from ..io.atomic import remove_folder
from ..io.interrupts import StopRequest
from ..io.manifest import MANIFEST, manifest_fault
from ..io.sync import kept_elsewhere
from ..memory.machine import reset_peak_memory
from ..memory.plan import SHARE
from ..model.adapters import AdapterStack
from ..train.callbacks import open_wandb, trackers
from ..train.checkpoint import resume_point
from ..train.loop import interrupted
from ..train.main import stopped_at_the_end
from ..train.objective import Outcome
from ..train.observer import Observer, Observers
from ..train.optim import make_optimizer, make_scheduler
from ..train.recorder import OnMetrics, Order, Recorder
from ..train.setup import save_stage, setup_stage
from ..train.stage import Say, Stage
from ..train.steps import step_schedule
from . import trl, unsloth
from .early import start_unsloth
from .rows import Dpo, Pairs, Rows, Sft, places, sees_only_itself, targets
from .trl import ADAPTER, Start, start_as_fused


def run_baseline(
    method: Method,
    loaded: Loaded,
    *,
    say: Say = print,
    on_metrics: OnMetrics = lambda step, total, metrics: None,
    observers: Sequence[Observer] = (),
) -> Outcome:
    """Train the stage that the configuration describes on TRL, from its last checkpoint if there is one.

    ``metrics.jsonl`` has the fused engine's names. TRL adds ``entropy`` and ``mean_token_accuracy`` (means over
    micro-batches), and its ``num_tokens`` counts a pair's prompt twice, because it computes it twice.

    Raises:
        UserError: as ``setup.setup_stage``; Unsloth cannot run here; TRL has no such loss; the loss is not finite.
        StageComplete: the stage is finished.
    """
    if loaded.config.engine == "unsloth":
        start_unsloth()
    _supported(method, loaded.config)
    stage = setup_stage(method, loaded, say=say)
    torch.set_num_threads(stage.plan.threads)
    reset_peak_memory(stage.base.device)
    trainer, recorder = make_trainer(stage, say=say, on_metrics=on_metrics)
    found = _resume_point(stage, say)
    done = 0 if found is None else int(found.name.split("-")[1])
    recorder.go_on(done)
    recorder.observer = Observers(observers)
    recorder.observer.begins(stage, recorder.unit, recorder.total, done)
    if found is not None:
        say(f"going on from {found.name}")
    started = time.perf_counter()
    with kept_elsewhere(stage.mirror):
        with StopRequest("the step is finished and a checkpoint written") as stop:
            recorder.stop = stop
            if found is not None and _is_last(found, recorder.total, stage.config):
                _restore(trainer, found)
            else:
                trainer.train(resume_from_checkpoint=str(found) if found else None)
        state = trainer.state
        if stop.name is not None and state.global_step < recorder.total:
            raise interrupted(stop.name, stage.dir, state.global_step, recorder.total)
        if recorder.output.fault is not None and state.global_step < recorder.total:
            raise recorder.output.fault
        best = None
        if state.best_metric is not None and state.best_global_step:
            best = (float(state.best_metric), int(state.best_global_step))
        outcome = Outcome(
            state.global_step,
            recorder.last,
            best,
            time.perf_counter() - started,
            recorder.left_out.watch.count,
            recorder.evaluations,
            recorder.warnings,
            stop.name,
        )
        save_stage(stage, outcome, say=say, own=AdapterStack(trainer.model).weights(ADAPTER))
        recorder.observer.ends(stage, outcome)
        stopped_at_the_end(stage, outcome)
    return outcome


def _is_last(checkpoint: Path, total: int, config: RunConfig) -> bool:
    """Whether nothing was left to be trained after a checkpoint. transformers would make one more step."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    waited = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    patience = config.early_stopping_patience or math.inf
    return state.global_step >= total or waited.get("early_stopping_patience_counter", 0) >= patience


def _restore(trainer: Any, checkpoint: Path) -> None:
    """What ``trainer.train`` would end with: the last checkpoint, or the best one."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    trainer._load_from_checkpoint(str(checkpoint))
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()


def _supported(method: Method, config: RunConfig) -> None:
    if method == "dpo" and config.loss_type == "ipo_sum":
        raise UserError("loss_type ipo_sum: TRL has IPO per token only.", "Set loss_type=ipo, or engine=fused.")
    if method == "dpo" and config.loss_type == "sigmoid" and config.label_smoothing:
        raise UserError(
            f"label_smoothing {config.label_smoothing}: TRL ignores it with loss_type sigmoid.",
            "Set loss_type=robust, or engine=fused.",
        )


def make_trainer(stage: Stage, *, say: Say, on_metrics: OnMetrics) -> tuple[Any, Recorder]:
    """TRL's trainer of an opened stage, ready to train, and what writes its metrics."""
    config = stage.config
    fast = config.engine == "unsloth"
    stage.info.setdefault("trl", {})
    settings = stage.info["trl"].setdefault("arguments", _split(stage))  # a resumed run keeps the split
    if fast:
        model, fresh = unsloth.attach(stage, say, checkpointing=settings["gradient_checkpointing"]), None
    else:
        model, fresh = trl.attach(stage, say)
    kept = Start(model) if fresh is None else None
    if stage.dir.path.is_dir():
        stage.dir.write_info(stage.info)
    _, total = step_schedule(config, len(stage.data.rows))
    unit = "tokens" if stage.method == "sft" else "pairs"
    recorder = Recorder(stage, unit, total, on_metrics, say)
    tokenizer = copy.deepcopy(stage.template.tokenizer)  # TRL sets its pad token
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    parts = [stage.data] if stage.eval_data is None else [stage.data, stage.eval_data]
    shared: dict[str, Any] = {
        "model": model,
        "train_dataset": places(stage.data),
        "eval_dataset": None if stage.eval_data is None else places(stage.eval_data),
        "processing_class": tokenizer,
        "callbacks": [recorder],
        "peft_config": fresh,
    }
    common = _arguments(stage, total) | settings
    trainer: Any
    if stage.method == "sft":
        lengths = fast and stage.base.device.type == "cuda"  # where Unsloth's own attention runs
        packed = sees_only_itself(model, with_lengths=lengths)
        if not packed:
            say("this architecture does not keep packed conversations apart: TRL gets them padded instead")
        if fast:
            common["loss_type"] = "nll"  # the one that Unsloth's own chunked loss replaces; TRL's default is TRL's own
        arguments = SFTConfig(**common, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        collator = Rows(parts, pad, packed=packed, with_lengths=lengths)
        trainer = Sft(**shared, args=arguments, data_collator=collator)
        if stage.eval_data is not None:
            trainer.eval_items = targets(stage.eval_data) / len(stage.eval_data.rows)
    else:
        if config.lora_dropout:
            say(f"lora_dropout {config.lora_dropout} is off: TRL's DPO would apply it to the reference too")
        arguments = DPOConfig(
            **common,
            max_length=None,
            beta=config.beta,
            loss_type=[config.loss_type],
            label_smoothing=config.label_smoothing,
            precompute_ref_log_probs=config.precompute_ref_log_probs,
        )
        trainer = Dpo(**shared, args=arguments, data_collator=Pairs(parts, pad))
    if kept is not None:
        kept.put_back(trainer.model, dropout=config.lora_dropout if stage.method == "sft" else 0.0)
    else:
        start_as_fused(trainer.model, config, stage.base.dtype)
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.optimizer = make_optimizer(config, parameters)
    trainer.lr_scheduler = make_scheduler(config, trainer.optimizer, total)
    recorder.trainer = trainer
    trainer.order = Order(config, len(stage.data.rows))
    trainer.remove_callback(PrinterCallback)
    if config.early_stopping_patience and stage.eval_data is not None:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
    say(
        f"{sum(p.numel() for p in parameters.values()):,} parameters are trained by TRL"
        + (" and Unsloth" if fast else "")
    )
    return trainer, recorder


def _arguments(stage: Stage, total: int) -> dict[str, Any]:
    """What both trainers' configurations share."""
    config = stage.config
    cuda = stage.base.device.type == "cuda"
    open_wandb(trackers(config), stage.dir)
    evaluates = stage.eval_data is not None and config.eval_steps is not None
    keep_best = bool(config.load_best_model_at_end and evaluates)
    # transformers can only go back to a checkpoint, so evaluations are where they are written
    save_steps = config.eval_steps if keep_best else config.save_steps
    return {
        "output_dir": str(stage.dir.path),
        "seed": config.seed,
        "max_steps": total,
        "max_grad_norm": config.max_grad_norm,
        "bf16": cuda and stage.base.dtype == torch.bfloat16,
        "fp16": cuda and stage.base.dtype == torch.float16,
        "use_cpu": not cuda,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": config.eval_steps if evaluates else None,
        "prediction_loss_only": True,
        "save_strategy": "steps" if save_steps else "no",
        "save_steps": save_steps or 500,
        "save_total_limit": config.save_total_limit,
        "load_best_model_at_end": keep_best,
        "metric_for_best_model": "eval_loss" if stage.eval_data is not None else None,
        "greater_is_better": False if stage.eval_data is not None else None,
        "report_to": config.report_to or "none",
        "run_name": f"{stage.dir.run.name}-{stage.dir.path.name}",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": cuda,
    }


def _split(stage: Stage) -> dict[str, Any]:
    """Micro-batches. TRL averages DPO's loss over them, a short one weighing as much as a full one: all are full."""
    rows, size = len(stage.data.rows), stage.config.batch_size
    held_out = 0 if stage.eval_data is None else len(stage.eval_data.rows)
    fits = 1
    if stage.method == "dpo":
        longest = max(
            len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids))
            for part in (stage.data, stage.eval_data)
            for p in (part.examples if part else ())
        )
        fits = max(1, stage.plan.micro_tokens // (2 * longest))
    per_epoch, total = step_schedule(stage.config, rows)
    partial = rows % size if total >= per_epoch else 0
    per_device = _largest_divisor(math.gcd(size, partial), fits)
    return {
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": size // per_device,
        "per_device_eval_batch_size": _largest_divisor(held_out, fits) if held_out else 1,
        "gradient_checkpointing": _checkpointing(stage, per_device),
    }


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)


def _checkpointing(stage: Stage, per_device: int) -> bool:
    """Whether TRL recomputes activations: as the plan says, or where its layers, which keep about three times as much as
    the fused engine's, would not fit. It knows nothing between all and nothing."""
    if stage.plan.recomputes or stage.config.memory.keep is not None:
        return stage.plan.recomputes
    longest = int(stage.data.lengths.max()) if stage.method == "dpo" else stage.config.max_length
    return 3 * stage.plan.bytes_per_token * longest * per_device > SHARE * stage.plan.free_bytes


def _resume_point(stage: Stage, say: Say) -> Path | None:
    """The newest checkpoint that is as it was written. transformers writes in place, trainer_state.json last, and then the
    recorder writes the manifest; what a killed process left of one is no checkpoint."""
    for path in stage.dir.checkpoints():
        if not (path / "trainer_state.json").is_file():
            remove_folder(path)
    return resume_point(
        stage.dir, say, fault=lambda path: manifest_fault(path) if (path / MANIFEST).is_file() else None
    )
