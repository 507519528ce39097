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
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerState
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..config.load import Method, RunConfig
from ..data.dataset import TokenizedDataset
from ..errors import UserError
from ..io.atomic import MANIFEST, manifest_fault, remove_folder
from ..io.interrupts import StopRequest
from ..memory.machine import reset_peak_memory
from ..memory.plan import SHARE
from ..model.adapters import AdapterStack
from ..model.compose import compose
from ..model.peft_io import LoraWeights, read_adapter, write_adapter
from ..train.callbacks import open_wandb, trackers
from ..train.checkpoint import resume_point
from ..train.loop import interrupted
from ..train.objective import Outcome
from ..train.observer import Observer
from ..train.optim import make_optimizer, make_scheduler
from ..train.stage import Stage
from ..train.steps import step_schedule
from . import unsloth
from .recorder import OnMetrics, Order, Recorder

logger = logging.getLogger(__name__)

ADAPTER = "default"  # the name that TRL looks for
REFERENCE = "ref"  # TRL's name of its frozen copy of it
# In nats a token, {32 bits: ...}: TRL's two passes round alike, but those of a precomputed reference ran in other batches.
START_TOLERANCE = {True: 1e-4, False: 5e-2}
LENGTHS = "packed_seq_lengths"  # Unsloth's name of the lengths of a packed row's sequences


def check_supported(method: Method, config: RunConfig) -> None:
    """Import Unsloth, where it is the engine, before anything is loaded.

    Raises:
        UserError: Unsloth cannot run here, or TRL has no such loss.
    """
    if config.engine == "unsloth":
        unsloth.start_unsloth()
    if method == "dpo" and config.loss_type == "ipo_sum":
        raise UserError("loss_type ipo_sum: TRL has IPO per token only.", "Set loss_type=ipo, or engine=fused.")
    if method == "dpo" and config.loss_type == "sigmoid" and config.label_smoothing:
        raise UserError(
            f"label_smoothing {config.label_smoothing}: TRL ignores it with loss_type sigmoid.",
            "Set loss_type=robust, or engine=fused.",
        )


def train_on_trl(
    stage: Stage, *, on_metrics: OnMetrics, observers: Sequence[Observer]
) -> tuple[Outcome, dict[str, LoraWeights]]:
    """Train a stage on TRL, from its last checkpoint if there is one; the outcome and the trained adapter's weights.

    ``metrics.jsonl`` has the fused engine's names. TRL adds ``entropy`` and ``mean_token_accuracy`` (means over
    micro-batches), and its ``num_tokens`` counts a pair's prompt twice, because it computes it twice.

    Raises:
        UserError: Unsloth cannot load the base, or loss or gradients are not finite three steps in a row.
        Interrupted: a signal came; there is a checkpoint.
    """
    torch.set_num_threads(stage.plan.threads)
    reset_peak_memory(stage.base.device)
    trainer, recorder = make_trainer(stage, on_metrics=on_metrics)
    found = _resume_point(stage)
    done = 0 if found is None else int(found.name.split("-")[1])
    recorder.resume(done)
    recorder.observers = observers
    for observer in observers:
        observer.on_train_begin(stage, recorder.unit, recorder.total, done)
    if found is not None:
        logger.info(f"going on from {found.name}")
    started = time.perf_counter()
    with StopRequest("the step is finished and a checkpoint written") as stop:
        recorder.stop = stop
        if found is None or not _restore_last(trainer, found, recorder.total, stage.config):
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
        recorder.left_out.count,
        recorder.evaluations,
        recorder.warnings,
        stop.name,
    )
    return outcome, AdapterStack(trainer.model).weights(ADAPTER)


def make_trainer(stage: Stage, *, on_metrics: OnMetrics) -> tuple[Any, Recorder]:
    """TRL's trainer of an opened stage, ready to train, and the callback that writes its metrics."""
    config, sft, fast = stage.config, stage.method == "sft", stage.config.engine == "unsloth"
    stage.info.setdefault("trl", {})
    settings = stage.info["trl"].setdefault("arguments", _split(stage))  # a resumed run keeps the split
    if fast:
        model, fresh = unsloth.attach(stage, checkpointing=settings["gradient_checkpointing"]), None
    else:
        model, fresh = attach(stage)
    kept = Start(model) if fresh is None else None
    if stage.dir.path.is_dir():
        stage.dir.write_info(stage.info)
    _, total = step_schedule(config, len(stage.data.rows))
    recorder = Recorder(stage, "tokens" if sft else "pairs", total, on_metrics)
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
    if sft:
        lengths = fast and stage.base.device.type == "cuda"  # where Unsloth's own attention runs
        packed = sees_only_itself(model, with_lengths=lengths)
        if not packed:
            logger.warning("this architecture does not keep packed conversations apart: TRL gets them padded instead")
        if fast:
            common["loss_type"] = "nll"  # the one that Unsloth's own chunked loss replaces
        arguments = SFTConfig(**common, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        collator = Rows(parts, pad, packed=packed, with_lengths=lengths)
        trainer = Sft(**shared, args=arguments, data_collator=collator)
        if stage.eval_data is not None:
            targets = sum(int(example.mask[1:].sum()) for example in stage.eval_data.examples)
            trainer.eval_items = targets / len(stage.eval_data.rows)
    else:
        if config.lora_dropout:
            logger.info(f"lora_dropout {config.lora_dropout} is off: TRL's DPO would apply it to the reference too")
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
        kept.put_back(trainer.model, dropout=config.lora_dropout if sft else 0.0)
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
    by = "TRL and Unsloth" if fast else "TRL"
    logger.info(f"{sum(p.numel() for p in parameters.values()):,} parameters are trained by {by}")
    return trainer, recorder


def _arguments(stage: Stage, total: int) -> dict[str, Any]:
    """The arguments that both trainers' configurations share."""
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
    fits = 1 if stage.method == "sft" else max(1, stage.plan.micro_tokens // (2 * longest_sequence(stage)))
    per_epoch, total = step_schedule(stage.config, rows)
    partial = rows % size if total >= per_epoch else 0
    per_device = _largest_divisor(math.gcd(size, partial), fits)
    # TRL recomputes all activations or none: as the plan says, or where its layers, which keep about three times as much as
    # the fused engine's, would not fit
    recomputes = stage.plan.recomputes
    if not recomputes and stage.config.memory.keep is None:
        longest = int(stage.data.lengths.max()) if stage.method == "dpo" else stage.config.max_length
        recomputes = 3 * stage.plan.bytes_per_token * longest * per_device > SHARE * stage.plan.free_bytes
    return {
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": size // per_device,
        "per_device_eval_batch_size": _largest_divisor(held_out, fits) if held_out else 1,
        "gradient_checkpointing": recomputes,
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


# -- checkpoints -------------------------------------------------------------------------------------------------------


def _resume_point(stage: Stage) -> Path | None:
    """The newest undamaged checkpoint. transformers writes in place, trainer_state.json last, and then the recorder writes
    the manifest: a folder without that state is what a killed process left."""
    for path in stage.dir.checkpoints():
        if not (path / "trainer_state.json").is_file():
            remove_folder(path)
    return resume_point(stage.dir, fault=lambda path: manifest_fault(path) if (path / MANIFEST).is_file() else None)


def _restore_last(trainer: Any, checkpoint: Path, total: int, config: RunConfig) -> bool:
    """Whether nothing was left to be trained after a checkpoint; then the trainer is as ``train`` would end, with the last
    checkpoint or the best one. (transformers would make one more step.)"""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    stopping = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    waited = stopping.get("early_stopping_patience_counter", 0)
    if state.global_step < total and waited < (config.early_stopping_patience or math.inf):
        return False
    trainer.state = state
    trainer._load_from_checkpoint(str(checkpoint))
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        trainer._load_best_model()
    return True


# -- rows --------------------------------------------------------------------------------------------------------------


def places(data: TokenizedDataset) -> datasets.Dataset:
    """A data set of row numbers; the collators read the rows themselves, so that nothing is copied. TRL keeps reference
    log-probabilities under a hash of the data set's content, which the fingerprint is for."""
    return datasets.Dataset.from_dict({"place": range(len(data.rows)), "of": [data.fingerprint] * len(data.rows)})


class Rows(DataCollatorForLanguageModeling):
    """TRL's collator, fed with packed rows: one flat row of conversations, or a padded batch of them.

    Args:
        parts: the data sets that rows may be of.
        pad: the padding token's id.
        packed: one flat row.
        with_lengths: add the lengths of a packed row's conversations, int32 [conversations].
    """

    def __init__(
        self, parts: Sequence[TokenizedDataset], pad: int, *, packed: bool, with_lengths: bool = False
    ) -> None:
        super().__init__(pad_token_id=pad, padding_free=packed)
        self.parts = {data.fingerprint: data for data in parts}
        self.with_lengths = packed and with_lengths

    def torch_call(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = []
        for data, index in ((d, i) for e in examples for d in [self.parts[e["of"]]] for i in d.rows[e["place"]]):
            example = data.examples[index]
            labels = torch.from_numpy(example.ids.astype("int64"))
            ids = labels.tolist()
            labels[torch.from_numpy(~example.mask)] = -100
            labels[0] = -100  # nothing predicts it
            rows.append({"input_ids": ids, "labels": labels.tolist()})
        batch = super().torch_call(rows)
        if self.with_lengths:
            batch[LENGTHS] = torch.tensor([len(row["input_ids"]) for row in rows], dtype=torch.int32)
        return batch


class Pairs(DataCollatorForPreference):
    """TRL's collator, fed with pairs; unsupervised tokens of a response are not counted as completion."""

    def __init__(self, parts: Sequence[TokenizedDataset], pad: int) -> None:
        super().__init__(pad_token_id=pad)
        self.parts = {data.fingerprint: data for data in parts}

    def torch_call(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        pairs = [self.parts[e["of"]].examples[e["place"]] for e in examples]  # a pair is a row
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        fed = [{**e, **{name: getattr(p, name).tolist() for name in names}} for e, p in zip(examples, pairs)]
        batch = super().torch_call(fed)
        masks = [p.chosen_mask for p in pairs] + [p.rejected_mask for p in pairs]
        for row, mask, pair in zip(batch["completion_mask"], masks, [*pairs, *pairs]):
            start = len(pair.prompt_ids)
            row[start : start + len(mask)] = torch.from_numpy(mask.astype("int64"))
        return batch


def sees_only_itself(model: Any, *, with_lengths: bool = False) -> bool:
    """Whether positions that start again at 0 keep two sequences of one row apart, as TRL's packing assumes.

    True of every architecture of transformers whose masks come from ``create_causal_mask``; the model is run, as it trains
    and as it evaluates, without dropout.

    Args:
        with_lengths: also pass the sequences' lengths, in Unsloth's argument.
    """
    device = next(model.parameters()).device
    first, second = (torch.arange(a, a + 12, device=device) % 100 for a in (3, 40))
    positions = torch.arange(12, device=device)
    lengths = {LENGTHS: torch.tensor([12, 12], dtype=torch.int32, device=device)} if with_lengths else {}
    both = {"input_ids": torch.cat([first, second])[None], "position_ids": torch.cat([positions, positions])[None]}
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 3e-2
    was_training = model.training
    try:
        for training in (False, True):
            model.train(training)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
            with torch.no_grad():
                alone = model(input_ids=second[None], position_ids=positions[None], use_cache=False).logits[0].float()
                packed = model(**both, **lengths, use_cache=False).logits[0, 12:].float()
            if not (packed - alone).norm() < tolerance * alone.norm():
                return False
    except TypeError:  # it takes no positions
        return False
    finally:
        model.train(was_training)
    return True


# -- trainers ----------------------------------------------------------------------------------------------------------


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
    """TRL's DPO on our rows. Before the first update policy and reference are one function, or training is refused."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training and self.state.global_step == 0:
            tokens = inputs["completion_mask"].sum().item() / len(inputs["completion_mask"])
            rewards = (self._metrics["train"][f"rewards/{side}"][-1] for side in ("chosen", "rejected"))
            apart = max(map(abs, rewards)) / self.beta / tokens
            if not apart <= START_TOLERANCE[self.model.dtype in (torch.float32, torch.float64)]:
                raise UserError(
                    f"step 1: policy and reference differ by {apart:.2e} nats a token before the first update, where they "
                    "must be the same: TRL's reference is not the model below.",
                    "Set engine=fused, and please report this.",
                )
        return found


# -- the adapter -------------------------------------------------------------------------------------------------------


def attach(stage: Stage) -> tuple[Any, LoraConfig | None]:
    """The model for TRL, and the adapter that TRL is to put on it; None where the model brings its own."""
    config = stage.config
    if stage.frozen and stage.base.load_in_4bit:
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "adapter"
            write_adapter(whole, compose(stage.frozen), base_model_name=str(stage.base.path))
            model = PeftModel.from_pretrained(stage.base.model, whole, is_trainable=True)
        train_below(stage, model.peft_config[ADAPTER].r)
        return model, None
    fresh = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        task_type="CAUSAL_LM",
    )
    return merged_below(stage), fresh


def merged_below(stage: Stage) -> Any:
    """The base with the adapters below merged into it (16 or 32 bits), or as it is where there are none."""
    model: Any = stage.base.model
    if stage.frozen:
        names = ", ".join(str(a.path) for a in stage.frozen)
        logger.info(
            f"TRL's reference is a plain model: {names} merged into the {stage.base.dtype} base, a fresh adapter on top"
        )
        for adapter in stage.frozen:
            model = PeftModel.from_pretrained(model, adapter.path).merge_and_unload()
        model.requires_grad_(False)
    return model


def train_below(stage: Stage, rank: int) -> None:
    """Say that the adapters below are trained on, and make the stage the owner of the whole chain."""
    logger.warning(
        f"TRL cannot leave a frozen adapter on under another in 4 bits: it trains "
        f"{', '.join(str(a.path) for a in stage.frozen)} on, at rank {rank} instead of lora_r {stage.config.lora_r}"
        + (", against a frozen copy" if stage.method == "dpo" else "")
    )
    stage.info["trl"].setdefault("continues", stage.info["adapters"])
    stage.info["adapters"] = []  # the trained adapter is the whole chain
    stage.frozen = []


class Start:
    """An adapter's float32 weights, before TRL rounds them to bfloat16."""

    def __init__(self, model: Any) -> None:
        self.weights = AdapterStack(model).weights(ADAPTER)

    def put_back(self, model: Any, *, dropout: float) -> None:
        """Into the adapter and, where there is one, into TRL's reference copy of it."""
        for module, layer in AdapterStack(model).lora_layers():
            for name in layer.lora_A:
                layer.lora_A[name].float()
                layer.lora_B[name].float()
                with torch.no_grad():
                    layer.lora_A[name].weight.copy_(self.weights[module].a)
                    layer.lora_B[name].weight.copy_(self.weights[module].b)
            layer.lora_dropout[ADAPTER] = nn.Dropout(dropout) if dropout else nn.Identity()


def start_as_fused(model: Any, config: RunConfig, dtype: torch.dtype) -> None:
    """Give the adapter the fused engine's initial weights (``AdapterStack.add_trainable``), in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(config.seed)
    for module in model.modules():
        if not isinstance(module, LoraLayer) or ADAPTER not in module.lora_A:
            continue
        for side in (module.lora_A, module.lora_B):
            side[ADAPTER].to(wide)
        weight = module.lora_A[ADAPTER].weight
        fresh = torch.empty(weight.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            weight.copy_(fresh)
            module.lora_B[ADAPTER].weight.zero_()
