"""A stage on TRL's trainers.

TRL's are the losses, forward and backward, accumulation, gradient clipping, the evaluation loop, checkpoints and resume; under
``engine: unsloth`` the model and its kernels are Unsloth's. Ours are the rows (tokenized and packed) and their order, the
initial adapter, the optimizer and the schedule of the fused engine. LoRA weights are float32 (TRL casts them to bfloat16 on
a 4-bit base, and its first DPO loss is then not ln 2).

Frozen adapters below the trained one: on a 16- or 32-bit base they are merged into it, and a fresh adapter is trained. A
4-bit base cannot take a merge without rounding, and TRL copies only one adapter into its reference: there the adapters below
(composed into one, where there are several) are trained on at their own rank, against a frozen copy.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerState
from transformers.pytorch_utils import Conv1D
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from ..config.load import Method, RunConfig
from ..errors import UserError
from ..io.atomic import remove_folder
from ..io.interrupts import StopRequest
from ..memory.machine import reset_peak_memory
from ..model.adapters import AdapterStack
from ..model.families import FAMILIES
from ..model.peft_io import LoraWeights, compose, read_adapter
from ..train.callbacks import open_wandb
from ..train.checkpoint import resume_point
from ..train.loop import interrupted
from ..train.optim import make_optimizer, make_scheduler
from ..train.stage import Observer, Outcome, Stage
from ..train.steps import step_schedule
from .collators import Pairs, Rows, places
from .recorder import Order, Recorder
from .unsloth import start_unsloth, unsloth_model

logger = logging.getLogger(__name__)

ADAPTER = "default"  # the name that TRL looks for
REFERENCE = "ref"  # TRL's name of its frozen copy of it


def check_supported(method: Method, config: RunConfig) -> None:
    """Import Unsloth, where it is the engine, before anything is loaded."""
    if config.engine == "unsloth":
        start_unsloth()
    if method == "dpo" and (missing := config.losses.keys() & {"ipo_sum", "simpo", "orpo", "kto"}):
        raise UserError(f"loss_type {', '.join(missing)}: TRL's DPO trainer does not have it.", "Set engine=fused.")
    if method == "dpo" and "sigmoid" in config.losses and config.label_smoothing:
        raise UserError(
            f"label_smoothing {config.label_smoothing}: TRL ignores it with loss_type sigmoid.",
            "Set loss_type=robust, or engine=fused.",
        )


def train_on_trl(stage: Stage, observers: Sequence[Observer]) -> tuple[Outcome, dict[str, LoraWeights]]:
    """Train a stage on TRL, from its last checkpoint if there is one (see ``loop.train``); the outcome and the trained adapter's
    weights.

    ``metrics.jsonl`` has the fused engine's names. TRL adds ``entropy`` and ``mean_token_accuracy`` (means over
    micro-batches), and its ``num_tokens`` counts a pair's prompt twice, because it computes it twice.
    """
    torch.set_num_threads(stage.plan.threads)
    reset_peak_memory(stage.base.device)
    trainer, recorder = make_trainer(stage, observers)
    for path in stage.dir.checkpoints():  # transformers writes in place, its state last: a killed process left this one
        if not (path / "trainer_state.json").is_file():
            remove_folder(path)
    found = resume_point(stage.dir)
    done = 0 if found is None else int(found.name.split("-")[1])
    recorder.resume(done)
    recorder.observers.tell("on_train_begin", stage, recorder.unit, recorder.total, done)
    if found is not None:
        logger.info(f"going on from {found.name}")
    started = time.perf_counter()
    with StopRequest("finishing the step and writing a checkpoint") as stop:
        recorder.stop = stop
        if found is not None and _is_finished(trainer, found, stage.config.early_stopping_patience):
            # nothing is left to be trained, and transformers would make one more step
            trainer._load_from_checkpoint(str(found))
            if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
                trainer._load_best_model()
        else:
            trainer.train(resume_from_checkpoint=str(found) if found else None)
    state = trainer.state
    if state.global_step < recorder.total:
        if stop.name is not None:
            raise interrupted(stop.name, stage.dir, state.global_step, recorder.total)
        if recorder.observers.fault is not None:
            raise recorder.observers.fault
    outcome = Outcome(
        state.global_step,
        recorder.last,
        (float(state.best_metric), int(state.best_global_step)) if state.best_global_step else None,
        time.perf_counter() - started,
        recorder.left_out.count,
        recorder.evaluations,
        recorder.warnings,
        stop.name,
        step_seconds=recorder.seconds,
    )
    return outcome, AdapterStack(trainer.model).weights(ADAPTER)


def _is_finished(trainer: Any, checkpoint: Path, patience: int | None) -> bool:
    """Load the trainer's state of a checkpoint; whether training ended there."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    stopping = trainer.state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    waited = stopping.get("early_stopping_patience_counter", 0)
    return trainer.state.global_step >= trainer.args.max_steps or waited >= (patience or math.inf)


def make_trainer(stage: Stage, observers: Sequence[Observer] = ()) -> tuple[Any, Recorder]:
    """TRL's trainer of an opened stage, ready to train, and the callback that writes its metrics."""
    config, sft, fast = stage.config, stage.method == "sft", stage.config.engine == "unsloth"
    settings = stage.info.setdefault("trl", {}).setdefault("arguments", _split(stage))  # a resumed run keeps the split
    model, fresh, weights = attach(stage, checkpointing=settings["gradient_checkpointing"])
    if stage.dir.path.is_dir():
        stage.dir.write_info(stage.info)
    recorder = Recorder(stage, observers)
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
    common = _arguments(stage, recorder.total) | settings
    trainer: Any
    if sft:
        # The masks of these architectures follow positions that start again at 0, as TRL's packing assumes.
        packed = model.config.model_type in FAMILIES
        if not packed:
            logger.warning(f"{model.config.model_type}: TRL gets packed conversations as a padded batch")
        if fast:
            common["loss_type"] = "nll"  # the one that Unsloth's own chunked loss replaces
        arguments = SFTConfig(**common, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        # Unsloth's own attention, which needs the lengths, runs on a GPU
        collator = Rows(parts, pad, packed=packed, with_lengths=fast and stage.base.device.type == "cuda")
        trainer = Sft(**shared, args=arguments, data_collator=collator)
        if stage.eval_data is not None:
            targets = sum(int(example.mask[1:].sum()) for example in stage.eval_data.examples)
            trainer.eval_items = targets / len(stage.eval_data.rows)
    else:
        if config.lora_dropout:
            logger.warning(f"lora_dropout {config.lora_dropout} is off: TRL's DPO would apply it to the reference too")
        arguments = DPOConfig(
            **common,
            max_length=None,
            beta=config.beta,
            loss_type=list(config.losses),
            loss_weights=list(config.losses.values()),
            label_smoothing=config.label_smoothing,
            precompute_ref_log_probs=config.precompute_ref_log_probs,
        )
        trainer = Dpo(**shared, args=arguments, data_collator=Pairs(parts, pad))
    put_weights(trainer.model, stage, weights, dropout=config.lora_dropout if sft else 0.0)
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.optimizer = make_optimizer(config, parameters)
    trainer.lr_scheduler = make_scheduler(config, trainer.optimizer, recorder.total)
    recorder.trainer = trainer
    trainer.order = Order(config, len(stage.data.rows))
    trainer.remove_callback(PrinterCallback)
    if config.early_stopping_patience and stage.eval_data is not None:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
    by = "TRL and Unsloth" if fast else "TRL"
    logger.info(f"{sum(p.numel() for p in parameters.values()):,} parameters are trained by {by}")
    return trainer, recorder


def _arguments(stage: Stage, total: int) -> dict[str, Any]:
    """The arguments that both trainers' configurations share."""
    config = stage.config
    cuda = stage.base.device.type == "cuda"
    open_wandb(stage)
    evaluates = stage.eval_data is not None and config.eval_steps is not None
    keep_best = bool(config.load_best_model_at_end and evaluates)
    # transformers can only go back to a checkpoint, so evaluations are where they are written
    save_steps = config.eval_steps if keep_best else config.save_steps
    return {
        "output_dir": str(stage.dir.path),
        "seed": config.seed,
        "max_steps": total,
        "max_grad_norm": config.max_grad_norm,
        "neftune_noise_alpha": config.neftune_noise_alpha if stage.method == "sft" else None,
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
    fits = 1 if stage.method == "sft" else max(1, stage.plan.micro_tokens // (2 * longest_sequence(stage)))
    per_epoch, total = step_schedule(stage.config, rows)
    partial = rows % size if total >= per_epoch else 0
    per_device = _largest_divisor(math.gcd(size, partial), fits)
    return {
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": size // per_device,
        "per_device_eval_batch_size": _largest_divisor(held_out, fits) if held_out else 1,
        "gradient_checkpointing": stage.plan.recomputes,
    }


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)


def longest_sequence(stage: Stage) -> int:
    """Tokens of the longest conversation, or of the longest prompt with one of its responses."""
    parts = [part for part in (stage.data, stage.eval_data) if part is not None]
    if stage.method == "sft":
        return max(int(part.lengths.max()) for part in parts)
    return max(
        len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        for part in parts
        for pair in part.examples
    )


# The adapter


def attach(stage: Stage, *, checkpointing: bool) -> tuple[Any, LoraConfig | None, Mapping[str, LoraWeights] | None]:
    """The model for TRL; the adapter that TRL is to put on it, None where the model brings its own; the weights to start from, None
    for those of a fresh adapter. ``checkpointing``: recompute activations in the backward pass, in Unsloth's way.
    """
    config, model = stage.config, stage.base.model
    targets, head = config.lora_target_modules, model.get_output_embeddings()
    if isinstance(targets, str):  # by name: PEFT's all-linear takes experts too, which are no linear layers
        linears = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
        targets = sorted({name.rsplit(".", 1)[-1] for name in linears})
    shape: dict[str, Any] = {
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "target_modules": targets,
    }
    below, names = None, ", ".join(str(a.path) for a in stage.frozen)
    if stage.frozen and stage.base.load_in_4bit:
        below = compose(stage.frozen)
        ranks = {module: w.a.shape[0] for module, w in below.items()}
        rank = max(ranks.values())
        others = {module: r for module, r in ranks.items() if r != rank}
        # composed weights have their scale in B
        shape = {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others}
        shape["target_modules"] = sorted(ranks)
        logger.warning(
            f"TRL cannot leave a frozen adapter on under another in 4 bits: it trains {names} on, at rank {rank} instead of "
            f"lora_r {config.lora_r}" + (", against a frozen copy" if stage.method == "dpo" else "")
        )
        stage.info["trl"].setdefault("continues", stage.info["adapters"])
        stage.info["adapters"] = []  # the trained adapter is the whole chain
        stage.frozen = []
    elif stage.frozen:
        logger.info(
            f"TRL's reference is a plain model: {names} merged into the {stage.base.dtype} base, a fresh adapter on top"
        )
        for adapter in stage.frozen:
            model = PeftModel.from_pretrained(model, adapter.path).merge_and_unload()
        model.requires_grad_(False)
    if config.engine == "unsloth":
        longest, limit = longest_sequence(stage), stage.base.model.max_seq_length
        if longest > limit:
            raise UserError(
                f"a row has {longest} tokens, and the model {limit} positions; Unsloth would cut it or stretch them.",
                f"Set max_length={limit}, or engine=fused.",
            )
        dropout = config.lora_dropout if stage.method == "sft" else 0.0
        model = unsloth_model(model, shape, dropout=dropout, seed=config.seed, checkpointing=checkpointing)
    else:
        lora = LoraConfig(**shape, lora_dropout=config.lora_dropout, task_type="CAUSAL_LM")
        if below is None:
            return model, lora, None
        model = get_peft_model(model, lora)
    if below is not None:  # TRL precomputes the reference when the trainer is made
        put_weights(model, stage, below, dropout=0.0)
    return model, None, below


def put_weights(model: Any, stage: Stage, weights: Mapping[str, LoraWeights] | None, *, dropout: float) -> None:
    """Give the adapter, and TRL's reference copy of it, their initial weights in float32 at least: TRL rounds to bfloat16. None:
    the fused engine's fresh ones (``AdapterStack.add_trainable``)."""
    wide = torch.promote_types(stage.base.dtype, torch.float32)
    generator = torch.Generator().manual_seed(stage.config.seed)
    for module, layer in AdapterStack(model).lora_layers():
        if weights is None:
            a = torch.empty(layer.lora_A[ADAPTER].weight.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            b = torch.zeros(())
        else:
            a, b = weights[module].a, weights[module].b
        for name in layer.lora_A:
            layer.lora_A[name].to(wide)
            layer.lora_B[name].to(wide)
            with torch.no_grad():
                layer.lora_A[name].weight.copy_(a)
                layer.lora_B[name].weight.copy_(b)
        layer.lora_dropout[ADAPTER] = nn.Dropout(dropout) if dropout else nn.Identity()


# Trainers


class _OurRows:
    """The changes of both trainers: rows come as they are, in our order, and nothing is sent or written outside the run."""

    order: Order

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Of a checkpoint with several adapters transformers loads those in sub-folders only: the reference, and not
        the policy, which would start over against it."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        model = self.model if model is None else model  # type: ignore[attr-defined]
        if REFERENCE in getattr(model, "peft_config", {}):
            AdapterStack(model).load(ADAPTER, read_adapter(resume_from_checkpoint).modules)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None: ...

    def _send_telemetry(self) -> None: ...


class Sft(_OurRows, SFTTrainer):
    """TRL's SFT on our rows."""

    eval_items: float  # supervised held-out tokens a row

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The mean over rows that transformers takes of this is the mean over all supervised tokens."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs, num_items_in_batch=self.eval_items), None, None


class Dpo(_OurRows, DPOTrainer):
    """TRL's DPO on our rows."""
