"""The same run on TRL's own trainers: same rows in the same order, same hyperparameters, same run folder.

What is TRL's: losses, forward and backward, accumulation, gradient clipping, evaluation loop, checkpoints and resume.
What is not: rows arrive tokenized and packed; the initial adapter, optimizer and schedule are the fused engine's; LoRA
weights are float32 (TRL casts them to bfloat16 on a 4-bit base, and its first DPO loss is then not ln 2).

What TRL can do exactly with frozen adapters below: on a 16- or 32-bit base they are merged into it, and a fresh adapter
is trained. A 4-bit base cannot take a merge without rounding, and TRL copies only one adapter into its reference: there
the adapters below (composed into one, where there are several) are trained on at their own rank, against a frozen copy.

Raises ``UserError`` for what TRL does not have: ``ipo_sum``, and label smoothing with ``sigmoid``, which it ignores.
"""

from __future__ import annotations

import copy
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
from transformers import EarlyStoppingCallback, PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..config import Loaded, Method, RunConfig
from ..data.prepare import Prepared
from ..errors import UserError
from ..model.adapters import AdapterStack
from ..model.peft_files import compose, write_adapter
from ..model.plan import SHARE
from .checkpoint import MetricsLog
from .loop import Outcome, step_schedule
from .optim import make_optimizer, make_scheduler
from .recorder import OnMetrics, Order, Recorder
from .setup import Say, Stage, close_stage, open_stage

ADAPTER = "default"  # the name that TRL looks for


def run_baseline(
    method: Method, loaded: Loaded, *, say: Say = print, on_metrics: OnMetrics = lambda step, total, metrics: None
) -> Outcome:
    """Train the stage that the configuration describes on TRL, from its last checkpoint if there is one.

    ``metrics.jsonl`` has the fused engine's names. TRL adds ``entropy`` and ``mean_token_accuracy`` (means over
    micro-batches), and its ``num_tokens`` counts a pair's prompt twice, because it computes it twice.

    Raises:
        UserError: as ``setup.open_stage``; the engine is not built, or TRL has no such loss; the loss is not finite.
        StageComplete: the stage is finished.
    """
    _supported(method, loaded.config)
    stage = open_stage(method, loaded, say=say)
    torch.set_num_threads(stage.plan.threads)
    trainer, recorder = make_trainer(stage, say=say, on_metrics=on_metrics)
    found = _resume_point(stage)
    recorder.log.truncate(0 if found is None else int(found.name.split("-")[1]))
    if found is not None:
        say(f"going on from {found.name}")
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    state = trainer.state
    best = None
    if state.best_metric is not None and state.best_global_step:
        best = (float(state.best_metric), int(state.best_global_step))
    outcome = Outcome(
        state.global_step, recorder.last, best, time.perf_counter() - started, evaluations=recorder.evaluations
    )
    close_stage(stage, outcome, say=say, own=AdapterStack(trainer.model).weights(ADAPTER))
    return outcome


def _supported(method: Method, config: RunConfig) -> None:
    if config.engine == "unsloth":
        raise UserError(
            "engine unsloth is not built in this version (the extra zephyr-lite[unsloth] only fixes the versions it "
            "will use: unsloth 2026.10.7 with transformers 5.17 and trl 1.14.2).",
            "Set engine=fused (Mistral and Llama families, the default), or engine=trl (any architecture).",
        )
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
    stage.info.setdefault("trl", {})
    model, continued = _stand_on_adapters(stage, say)
    kept = _Start(model) if continued else None
    settings = stage.info["trl"].setdefault("arguments", _split(stage))  # a resumed run keeps the split
    if stage.dir.path.is_dir():
        stage.dir.write_info(stage.info)
    _, total = step_schedule(config, len(stage.data.rows))
    unit = "tokens" if stage.method == "sft" else "pairs"
    recorder = Recorder(stage, MetricsLog(stage.dir.metrics), unit, total, on_metrics)
    tokenizer = copy.deepcopy(stage.template.tokenizer)  # TRL sets its pad token
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    parts = [stage.data] if stage.eval_data is None else [stage.data, stage.eval_data]
    shared: dict[str, Any] = {
        "model": model,
        "train_dataset": places(stage.data),
        "eval_dataset": None if stage.eval_data is None else places(stage.eval_data),
        "processing_class": tokenizer,
        "callbacks": [recorder],
        "peft_config": None
        if continued
        else LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
            task_type="CAUSAL_LM",
        ),
    }
    common = _arguments(stage, total) | settings
    trainer: Any
    if stage.method == "sft":
        packed = sees_only_itself(model)
        if not packed:
            say("this architecture does not keep packed conversations apart: TRL gets them padded instead")
        arguments = SFTConfig(**common, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = Sft(**shared, args=arguments, data_collator=Rows(parts, pad, packed=packed))
        if stage.eval_data is not None:
            trainer.eval_items = _targets(stage.eval_data) / len(stage.eval_data.rows)
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
        _start_as_fused(trainer.model, config, stage.base.dtype)
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.optimizer = make_optimizer(config, parameters)
    trainer.lr_scheduler = make_scheduler(config, trainer.optimizer, total)
    trainer.order = Order(config, len(stage.data.rows))
    trainer.remove_callback(PrinterCallback)
    if config.early_stopping_patience and stage.eval_data is not None:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
    say(f"{sum(p.numel() for p in parameters.values()):,} parameters are trained by TRL")
    return trainer, recorder


def _arguments(stage: Stage, total: int) -> dict[str, Any]:
    """What both trainers' configurations share."""
    config = stage.config
    cuda = stage.base.device.type == "cuda"
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


def _stand_on_adapters(stage: Stage, say: Say) -> tuple[Any, bool]:
    """The model to hand to TRL, and whether it goes on training the adapters below instead of a fresh one."""
    if not stage.frozen:
        return stage.base.model, False
    names = ", ".join(str(a.path) for a in stage.frozen)
    if not stage.base.load_in_4bit:
        say(
            f"TRL's reference is a plain model: {names} merged into the {stage.base.dtype} base, a fresh adapter on top"
        )
        model: Any = stage.base.model
        for adapter in stage.frozen:
            model = PeftModel.from_pretrained(model, adapter.path).merge_and_unload()
        model.requires_grad_(False)
        return model, False
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "adapter"
        write_adapter(whole, compose(stage.frozen), base_model_name=str(stage.base.path))
        model = PeftModel.from_pretrained(stage.base.model, whole, is_trainable=True)
    say(
        f"TRL cannot leave a frozen adapter on under another in 4 bits: it trains {names} on, at rank "
        f"{model.peft_config[ADAPTER].r} instead of lora_r {stage.config.lora_r}"
        + (", against a frozen copy" if stage.method == "dpo" else "")
    )
    stage.info["trl"].setdefault("continues", stage.info["adapters"])
    stage.info["adapters"] = []  # what is trained here is the whole chain
    stage.frozen = []
    return model, True


class _Start:
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


def _start_as_fused(model: Any, config: RunConfig, dtype: torch.dtype) -> None:
    """The fused engine's initial adapter (``AdapterStack.add_trainable``), in float32 at least."""
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
    """Whether TRL recomputes activations: as the plan says, or where its layers, which keep about twice as much as the
    fused engine's, would not fit."""
    if stage.plan.keep == "input" or stage.config.memory.keep is not None:
        return stage.plan.keep == "input"
    longest = int(stage.data.lengths.max()) if stage.method == "dpo" else stage.config.max_length
    return 2 * stage.plan.bytes_per_token * longest * per_device > SHARE * stage.plan.free_bytes


def sees_only_itself(model: Any) -> bool:
    """Whether positions that start again at 0 keep two sequences of one row apart, as TRL's packing takes for granted.

    True of every architecture of transformers whose masks come from ``create_causal_mask``; the model is asked.
    """
    device = next(model.parameters()).device
    first, second = (torch.arange(a, a + 12, device=device) % 100 for a in (3, 40))
    positions = torch.arange(12, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = model(input_ids=second[None], position_ids=positions[None], use_cache=False).logits[0].float()
            both = (
                model(
                    input_ids=torch.cat([first, second])[None],
                    position_ids=torch.cat([positions, positions])[None],
                    use_cache=False,
                )
                .logits[0, 12:]
                .float()
            )
    except TypeError:  # it takes no positions
        return False
    finally:
        model.train(was_training)
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 3e-2
    return ((both - alone).norm() / alone.norm()).item() < tolerance


def places(data: Prepared) -> datasets.Dataset:
    """A data set of places; the collators read the rows themselves, so that nothing is copied. The fingerprint is there
    because TRL keeps reference log-probabilities under a hash of the data set's content."""
    return datasets.Dataset.from_dict({"place": range(len(data.rows)), "of": [data.fingerprint] * len(data.rows)})


def _targets(data: Prepared) -> int:
    return sum(int(e.mask[1:].sum()) for e in data.examples)


class Rows(DataCollatorForLanguageModeling):
    """TRL's collator, fed with packed rows: one flat row of conversations, or a padded batch of them."""

    def __init__(self, parts: Sequence[Prepared], pad: int, *, packed: bool) -> None:
        super().__init__(pad_token_id=pad, padding_free=packed)
        self.parts = {data.fingerprint: data for data in parts}

    def torch_call(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = []
        for data, index in ((d, i) for e in examples for d in [self.parts[e["of"]]] for i in d.rows[e["place"]]):
            example = data.examples[index]
            labels = torch.from_numpy(example.ids.astype("int64"))
            ids = labels.tolist()
            labels[torch.from_numpy(~example.mask)] = -100
            labels[0] = -100  # nothing stands before it
            rows.append({"input_ids": ids, "labels": labels.tolist()})
        return super().torch_call(rows)


class Pairs(DataCollatorForPreference):
    """TRL's collator, fed with pairs; tokens of a response that nobody supervises are no completion."""

    def __init__(self, parts: Sequence[Prepared], pad: int) -> None:
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


class _OurRows:
    """What both trainers change: rows come as they are, in our order, and nothing is sent or written beside the run."""

    order: Order

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run folder says what it is."""

    def _send_telemetry(self) -> None:
        """A run tells nobody."""


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


def _resume_point(stage: Stage) -> Path | None:
    """The newest checkpoint that transformers finished: it writes trainer_state.json last."""
    found = [p for p in stage.dir.checkpoints() if (p / "trainer_state.json").is_file()]
    return found[-1] if found else None
