"""Keys of TRL's, transformers' and the alignment handbook's YAML files, in this project's words.

``ALIASES`` renames a key, ``FIXED`` accepts one that changes nothing here and says why.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from .errors import UserError
from .words import short

# other tools' name -> ours
ALIASES = {
    "model_name": "model_name_or_path",
    "base_model": "model_name_or_path",
    "revision": "model_revision",
    "adapter_name_or_path": "adapters",
    "max_seq_length": "max_length",
    "torch_dtype": "dtype",
    "use_4bit": "load_in_4bit",
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant",
    "learning_rate_scheduler": "lr_scheduler_type",
    "train_batch_size": "batch_size",
    "target_modules": "lora_target_modules",
    "precompute_ref_logps": "precompute_ref_log_probs",
}

# accepted, and why it changes nothing
FIXED = {
    "bf16": "the compute dtype follows the card; set dtype to choose it",
    "fp16": "the compute dtype follows the card; set dtype to choose it",
    "tf32": "matrix products run in the compute dtype",
    "gradient_checkpointing": "the plan decides what is kept for the backward pass",
    "gradient_checkpointing_kwargs": "the plan decides what is kept for the backward pass",
    "activation_checkpointing": "the plan decides what is kept for the backward pass",
    "packing": "rows are always packed, and never see each other",
    "packing_strategy": "rows are always packed best-fit",
    "padding_free": "there is no padding",
    "use_peft": "adapters are what is trained, always",
    "lora_task_type": "the task is always causal language modelling",
    "bnb_4bit_quant_type": "4 bits are always NF4",
    "bnb_4bit_compute_dtype": "the compute dtype follows the card; set dtype to choose it",
    "attn_implementation": "attention works over the segment table",
    "use_flash_attention_2": "attention works over the segment table",
    "trust_remote_code": "remote code is never run",
    "do_train": "the command trains",
    "do_eval": "a run with an eval_dataset is evaluated; set eval_dataset to null to leave it out",
    "overwrite_output_dir": "a finished stage is never overwritten; choose another output_dir or stage",
    "resume_from_checkpoint": "an unfinished stage always goes on from its last checkpoint",
    "remove_unused_columns": "columns that nothing reads are always dropped",
    "preprocessing_num_workers": "rows are prepared by as many processes as the machine has cores",
    "dataset_num_proc": "rows are prepared by as many processes as the machine has cores",
    "dataloader_num_workers": "rows are prepared before the first step",
    "log_level": "the console decides",
    "logging_strategy": "set logging_steps",
    "logging_first_step": "the first step is always logged",
    "save_strategy": "set save_steps",
    "per_device_eval_batch_size": "the plan decides how many rows are evaluated at once",
    "use_liger_kernel": "the engine has kernels of its own",
    "use_cpu": "a GPU is used where there is one",
    "run_name": "the run is named after its output_dir",
    "ddp_find_unused_parameters": "there is nothing unused",
    "hub_strategy": "a finished stage is pushed once",
    "dataset_text_field": "columns are found by themselves; set dataset.columns to name them",
    "ref_model_name_or_path": None,  # refused, with a reason of its own (see unknown_key)
}


def rename(values: dict[str, Any], where: str, own: Collection[str], notes: list[str]) -> dict[str, Any]:
    """Other tools' keys to ours; the combinations first (micro-batch times accumulation, data-set mixtures).

    Args:
        values: what a file or the command line says.
        where: that file, or "the command line", for messages.
        own: the keys of the schema.
        notes: gets a line for each key that was renamed or that changes nothing here.

    Raises:
        UserError: a key that nobody knows, or one that cannot be translated.
    """
    values = dict(values)
    result: dict[str, Any] = {}
    micro, accumulation = (
        values.pop("per_device_train_batch_size", None),
        values.pop("gradient_accumulation_steps", None),
    )
    if micro is not None or accumulation is not None:
        try:
            result["batch_size"] = int(micro or 1) * int(accumulation or 1)
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"{where}: per_device_train_batch_size {short(micro)} and gradient_accumulation_steps "
                f"{short(accumulation)} must be whole numbers."
            ) from None
        notes.append(f"batch_size = {result['batch_size']} (micro-batch × accumulation); the plan splits it")
    _rename_dataset(values, result, notes)
    for strategy, steps in (("eval_strategy", "eval_steps"), ("evaluation_strategy", "eval_steps")):
        if strategy in values:
            chosen = values.pop(strategy)
            if chosen in ("no", False):
                result["eval_dataset"] = None
            elif chosen == "epoch":
                values.setdefault(steps, None)
                notes.append(f"{strategy}: epoch is an evaluation at the end of the stage")
    hub_id = values.pop("hub_model_id", None)
    if values.get("push_to_hub") is True:  # transformers' way: a switch, and a name beside it
        if not hub_id:
            raise UserError(f"{where}: push_to_hub says that, not where to.", "Set push_to_hub=OWNER/NAME.")
        values["push_to_hub"] = hub_id
    if (only := values.pop("assistant_only_loss", None)) is not None:
        values.setdefault("loss_on", "assistant" if only else "all")
        notes.append("assistant_only_loss is loss_on here")
    if isinstance(warmup := values.get("warmup_steps"), float) and warmup < 1:
        values["warmup_ratio"] = values.pop("warmup_steps")
    for key, value in values.items():
        if key in own:
            result[key] = value
        elif key in ALIASES:
            result[ALIASES[key]] = value
            notes.append(f"{key} is {ALIASES[key]} here")
        elif (reason := FIXED.get(key)) is not None:
            notes.append(f"{key} changes nothing here: {reason}")
        else:
            raise UserError(f"{where}: {unknown_key(key, own)}")
    if result.get("max_steps") in (-1, 0):  # transformers' "not set"
        result["max_steps"] = None
    if isinstance(dtype := result.get("dtype"), str):
        result["dtype"] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(dtype, dtype)
    return result


def _rename_dataset(values: dict[str, Any], result: dict[str, Any], notes: list[str]) -> None:
    """``dataset_name`` + splits, or the handbook's ``dataset_mixer`` {path: share} + ``dataset_splits``."""
    mixer, splits = values.pop("dataset_mixer", None), values.pop("dataset_splits", None)
    train_split, test_split = values.pop("dataset_train_split", None), values.pop("dataset_test_split", None)
    hub_config = values.pop("dataset_config", None)
    if isinstance(mixer, dict):
        train = next((s for s in splits or [] if s.startswith("train")), "train")
        test = next((s for s in splits or [] if s.startswith("test")), None)
        result["dataset"] = [{"path": path, "split": train, "weight": share} for path, share in mixer.items()]
        result["eval_dataset"] = [{"path": path, "split": test} for path in mixer] if test else None
        notes.append("dataset_mixer is dataset, with weight, here")
    if (name := values.pop("dataset_name", None)) is not None:
        common = {"path": name, **({"name": hub_config} if hub_config else {})}
        result["dataset"] = [{**common, "split": train_split or "train"}]
        result["eval_dataset"] = [{**common, "split": test_split}] if test_split else None
        notes.append("dataset_name is dataset here")


def unknown_key(key: str, own: Collection[str]) -> str:
    """What to say of a key that is none: the nearest known one."""
    if key == "ref_model_name_or_path":
        return (
            "ref_model_name_or_path: there is no second model; the reference is the same base with the adapter under "
            "training turned off. Put what should lie below it into adapters."
        )
    if option := difflib.get_close_matches(
        key[:100].replace("_", ""), ("dryrun", "config", "verbose"), n=1, cutoff=0.75
    ):
        return f"there is no key {short(key)}. Did you mean --{'dry-run' if option[0] == 'dryrun' else option[0]}?"
    known = [*own, *([] if "." in key else [*ALIASES, "assistant_only_loss", "hub_model_id"])]
    near = difflib.get_close_matches(key[:100], known, n=1, cutoff=0.6)
    return f"there is no key {short(key)}." + (
        f" Did you mean {near[0]!r}?" if near else " See docs/configuration.md for all keys."
    )
