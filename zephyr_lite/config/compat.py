"""Keys of the YAML files of TRL, the alignment handbook, LLaMA-Factory and Axolotl, translated to this project's.

Every field of TRL's configuration classes has one verdict, and a test compares the tables with the installed TRL: it is
a key here, or translated (``ALIASES``, ``TRANSLATED``); it has no effect here (``ACCEPTED``); or it would change the
training, and only the values that do not are accepted (``REFUSED``).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from typing import Any

from ..io.text import comma_list, short

# other tools' name -> ours, the value as it is
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
    "lr_scheduler": "lr_scheduler_type",
    "train_batch_size": "batch_size",
    "target_modules": "lora_target_modules",
    "precompute_ref_logps": "precompute_ref_log_probs",
    "chat_template_path": "chat_template",
    # LLaMA-Factory's and Axolotl's
    "val_set_size": "val_size",
    "optimizer": "optim",
    "default_system": "system",
    "double_quantization": "bnb_4bit_use_double_quant",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "peft_use_rslora": "use_rslora",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "rl_beta": "beta",
    "orpo_alpha": "beta",
    "pref_beta": "beta",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
    "dpo_label_smoothing": "label_smoothing",
}
# the weight of the chosen responses' negative log-likelihood beside the loss, in TRL's DPO and CPO and in LLaMA-Factory
SFT_WEIGHTS = ("rpo_alpha", "cpo_alpha", "pref_ftx")

# other tools' name -> ours, where ``_datasets`` translates the value too
_DATASETS = {
    "dataset_name": "dataset",
    "dataset_config": "dataset.name",
    "dataset_train_split": "dataset.split",
    "dataset_test_split": "eval_dataset",
    "dataset_mixer": "dataset",
    "dataset_splits": "dataset.split",
    "dataset_configs": "dataset.name",
    "dataset_mixture": "dataset",
    "datasets": "dataset",
    "test_split_size": "dataset.test_size",
    "dataset_text_field": "dataset.columns",
    "max_samples": "dataset.limit",
    "test_datasets": "eval_dataset",
}
# and where ``rename`` does
TRANSLATED = {
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size",
    **_DATASETS,
    "eval_strategy": "eval_steps",
    "evaluation_strategy": "eval_steps",
    "hub_model_id": "push_to_hub",
    "assistant_only_loss": "loss_on",
    "completion_only_loss": "loss_on",
    "disable_dropout": "lora_dropout",
    "lora_target_linear": "lora_target_modules",
    "rl": "loss_type (sigmoid for dpo; ipo, kto, orpo and simpo as they are)",
    "pref_loss": "loss_type",
    **dict.fromkeys(SFT_WEIGHTS, "loss_type [LOSS, sft], loss_weights [1, VALUE]"),
    "model_init_kwargs": "its keys",
    "dataset_kwargs": "its keys",
    "special_tokens": "its keys",
}
# keys that only these tools have
_TOOLS = {
    "Axolotl": {"adapter", "dataset_prepared_path", "lora_target_linear", "micro_batch_size", "optimizer", "rl"}
    | {"sample_packing", "sequence_len", "special_tokens"},
    "LLaMA-Factory": {"cutoff_len", "finetuning_type", "lora_rank", "lora_target", "overwrite_cache", "plot_loss"}
    | {"pref_beta", "pref_ftx", "pref_loss", "quantization_bit", "template"},
}
_ACCEPTED = {
    "the compute dtype follows the card; set dtype to choose it": "bf16 fp16 bf16_full_eval fp16_full_eval tf32 "
    "bnb_4bit_compute_dtype",
    "the plan chooses micro-batches and what is kept in memory": "gradient_checkpointing gradient_checkpointing_kwargs "
    "activation_checkpointing activation_checkpointing_kwargs activation_offloading auto_find_batch_size "
    "per_device_eval_batch_size precompute_ref_batch_size eval_accumulation_steps torch_empty_cache_steps "
    "low_cpu_mem_usage device_map base_model_attribute_name use_logits_to_keep lora_on_cpu",
    "rows are always packed without padding, and never see each other; batch_size counts packed rows": "packing "
    "eval_packing padding_free pad_to_multiple_of pad_token padding_value label_pad_token_id num_of_sequences chars_per_token "
    "sample_packing eval_sample_packing pad_to_sequence_len neat_packing",
    "a LoRA adapter is always trained, on whole layers": "use_peft bnb_4bit_quant_storage fsdp fsdp_config",
    "the engine has its own attention and kernels": "attn_implementation use_flash_attention_2 use_liger_kernel "
    "use_liger use_liger_loss enable_liger_kernel liger_rope liger_rms_norm liger_glu_activation liger_layer_norm "
    "liger_fused_linear_cross_entropy flash_attention xformers_attention sdp_attention flash_attn lora_mlp_kernel "
    "lora_qkv_kernel lora_o_kernel use_unsloth liger_kernel_config torch_compile torch_compile_backend torch_compile_mode "
    "use_cache",
    "remote code is never run": "trust_remote_code",
    "the command trains, and evaluates if there is an eval_dataset, with its own metrics": "do_train do_predict do_eval "
    "eval_on_start prediction_loss_only include_for_metrics batch_eval_metrics eval_do_concat_batches "
    "eval_use_gather_object generate_during_eval eval_table_size",
    "unused columns are always dropped": "remove_unused_columns label_names length_column_name",
    "rows are prepared before the first step, by as many processes as the machine has cores": "dataset_num_proc "
    "preprocessing_num_workers dataset_streaming streaming dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
    "dataset_batch_size dataset_prepared_path dataset_processes overwrite_cache preprocessing_batch_size tokenized_path",
    "the chat template is the base's own, or Zephyr's if it has none; set chat_template to choose another": "template",
    "dataset names files and hub ids, not the entries of dataset_info.json": "dataset_dir",
    "eval_steps and save_steps count steps; set these": "evals_per_epoch saves_per_epoch",
    "config.json and the tokenizer's files name the classes; all keys are checked": "model_type tokenizer_type strict",
    "the adapter has no name to choose": "model_adapter_name",
    "seed decides the order of rows and all random numbers": "shuffle_dataset shuffle_merged_datasets data_seed full_determinism",
    "a row begins with BOS exactly once": "add_special_tokens",
    "console, metrics.jsonl and trackers have their own form; set logging_steps and report_to": "log_level "
    "log_level_replica logging_strategy logging_first_step log_on_each_node logging_nan_inf_filter logging_dir "
    "disable_tqdm include_num_input_tokens_seen skip_memory_metrics debug run_name project trackio_space_id "
    "trackio_bucket_id trackio_static_space_id plot_loss wandb_project wandb_entity wandb_watch wandb_name wandb_run_id "
    "wandb_log_model",
    "a stage continues exactly where it stopped, and is never overwritten; set save_steps": "save_strategy "
    "save_only_model save_on_each_node save_safetensors enable_jit_checkpoint ignore_data_skip overwrite_output_dir "
    "restore_callback_states_from_checkpoint auto_resume_from_checkpoints",
    "torchrun and the engine decide; a GPU is used if there is one": "use_cpu no_cuda local_rank "
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout "
    "ignore_bias_buffers",
    "embeddings have no adapter": "loraplus_lr_embedding",
    "a finished stage is pushed once": "hub_strategy hub_always_push",
    "it is the parameter of a loss or an option that is off": "f_alpha_divergence_coef discopop_tau ref_model_mixup_alpha "
    "ref_model_sync_steps",
}
ACCEPTED: dict[str, str] = {}
for _why, _keys in _ACCEPTED.items():
    ACCEPTED |= dict.fromkeys(_keys.split(), _why)

# Axolotl's formats of rows that are found by their columns here
_FORMATS = ("chat_template", "sharegpt", "alpaca", "completion", "chatml", "llama3", "zephyr")
_TURNS = (("role", "role"), ("role", "from"), ("content", "content"), ("content", "value"))
# key -> the values that change nothing here, and why others are refused
_PLAIN = "only plain LoRA is trained"
_REFERENCE = "the reference is the base with the adapters below the trained one: set adapters"
_CUT = "an answer is cut only where prompt and answer are longer than max_length: set max_length and max_prompt_length"
_BITS = "a base is held in 4 bits (load_in_4bit: true) or in 16 (false)"
_DPO = "it changes the loss of DPO, and is not implemented"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(("ref_model_name_or_path", "ref_adapter_name", "ref_model"), ((), _REFERENCE)),
    "ref_model_init_kwargs": (({},), _REFERENCE),
    "force_use_ref_model": ((False,), _REFERENCE),
    **dict.fromkeys(("max_completion_length", "max_target_length"), ((), _CUT)),
    "is_encoder_decoder": ((False,), "only decoder models are trained"),
    "tools": (([],), "tools are given to no chat template"),
    "finetuning_type": (("lora",), _PLAIN),
    "adapter": (("lora", "qlora"), _PLAIN),
    **dict.fromkeys(("additional_target", "freeze_trainable_layers", "unfrozen_parameters"), ((), _PLAIN)),
    **dict.fromkeys(("lora_fan_in_fan_out", "pissa_init"), ((False,), _PLAIN)),
    "lora_model_dir": (("",), "a stage trains a new adapter: name the ones below it in adapters"),
    "quantization_bit": ((4,), _BITS),
    "quantization_method": (("bnb", "bitsandbytes"), "4 bits are NF4"),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt"), ((False,), "for a loss over all tokens set loss_on=all")),
    "mask_history": ((False,), "for a loss over the last answer only set loss_on=last"),
    "plugins": (([], ["axolotl.integrations.liger.LigerPlugin"]), "plugins are not loaded"),
    "optim_args": (("",), "AdamW's options are adam_beta1, adam_beta2, adam_epsilon and weight_decay"),
    "optim_target_modules": ((), "GaLore and similar methods are not implemented"),
    "label_smoothing_factor": ((0,), "the targets are not smoothed"),
    "average_tokens_across_devices": ((True,), "the loss is a mean over the tokens of all devices"),
    "dataloader_drop_last": ((False,), "the last rows of an epoch are trained on too"),
    "train_sampling_strategy": (("random",), "rows come in random order"),
    "group_by_length": ((False,), "rows come in random order"),
    "eval_delay": ((0,), "evaluation begins with the first eval_steps"),
    "metric_for_best_model": (("loss", "eval_loss"), "the best adapter is that of the lowest held-out loss"),
    "greater_is_better": ((False,), "the best adapter is that of the lowest held-out loss"),
    "resume_from_checkpoint": ((True, False), "a stage continues from its own checkpoint; name others in adapters"),
    "accelerator_config": (({}, ""), "accelerate's options are not read"),
    "parallelism_config": ((), "one GPU holds a whole layer; torchrun starts a process for each"),
    "deepspeed": (("",), "DeepSpeed is not used, and its file may set the optimizer"),
    "hub_token": ((), "tokens do not belong in a file; run `hf auth login`"),
    "hub_revision": (("main",), "the adapter is pushed to the branch main"),
    "hub_model_revision": (("main",), "the adapter is pushed to the branch main"),
    **dict.fromkeys(
        ("tokenizer_name_or_path", "tokens", "bos_token", "unk_token"),
        ((), "the base's own tokenizer is used, with its embeddings"),
    ),
    "eos_token": ((), "answers end as the chat template ends them"),
    "truncation_mode": (("keep_start",), "rows are cut at their end; a prompt of dpo at its start"),
    "packing_strategy": (("bfd", "ffd"), "a row longer than max_length is cut, and neither split nor wrapped"),
    "append_concat_token": ((False,), "nothing is put between rows"),
    "skip_prepare_dataset": ((False,), "rows are conversations or texts, and are tokenized here"),
    "router_aux_loss_coef": ((0,), "mixtures of experts have no balancing loss here"),
    "lora_modules_to_save": (([],), _PLAIN),
    "lora_target_parameters": (([],), f"{_PLAIN}, on the modules of lora_target_modules"),
    "lora_task_type": (("CAUSAL_LM",), "the task is causal language modelling"),
    "use_dora": ((False,), _PLAIN),
    "load_in_8bit": ((False,), _BITS),
    "bnb_4bit_quant_type": (("nf4",), "4 bits are NF4"),
    "quantization_config": ((), "write load_in_4bit and bnb_4bit_use_double_quant"),
    "ld_alpha": ((1,), _DPO),
    "f_divergence_type": (("reverse_kl",), _DPO),
    "use_weighting": ((False,), _DPO),
    "sync_ref_model": ((False,), "the reference never changes"),
    "reference_free": ((False,), _DPO),
    "env": (({},), "set environment variables in the shell"),
}

# the types of the values that ``rename`` translates
_TYPES = {
    dict: ("keys and values", "model_init_kwargs dataset_kwargs special_tokens dataset_mixer dataset_mixture"),
    list: ("a list", "dataset_splits dataset_configs datasets test_datasets"),
    int: ("a whole number", "max_samples"),
    str: ("a text", "dataset_name dataset_config dataset_train_split dataset_test_split dataset_text_field"),
    bool: ("true or false", "assistant_only_loss completion_only_loss disable_dropout lora_target_linear"),
}
_VALUES: dict[str, dict[Any, Any]] = {
    "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", None: "auto"},
    "optim": {"adamw_torch_fused": "adamw_torch", "adamw_hf": "adamw_torch", "adamw_bnb_8bit": "adamw_8bit"}
    | {"paged_adamw": "paged_adamw_32bit"},
    "chat_template": {"tokenizer_default": "auto"},
    "max_steps": {-1: None, 0: None},  # transformers' "not set"
}
# null is TRL's "not set" of these
_UNSET = (
    *("model_revision", "chat_template", "lora_target_modules", "use_rslora", "warmup_ratio", "save_total_limit"),
    *("hub_private_repo", "adam_beta1", "adam_beta2", "adam_epsilon"),
)
_LISTS = ("dataset", "eval_dataset", "adapters", "lora_target_modules", "loss_type", "loss_weights", "report_to")
# the micro-batch's two names, and the accumulation steps
BATCH_PARTS = ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps")


def rename(
    values: dict[str, Any],
    own: Collection[str],
    notes: list[str],
    faults: list[str],
    *,
    file: bool = False,
    dpo: bool = False,
) -> dict[str, Any]:
    """Other tools' keys as this project's; combinations first (micro-batch × accumulation, data-set mixtures).

    Args:
        values: keys and values of a file or of the command line.
        own: the keys of the schema.
        notes: one line is added for each key that was renamed or has no effect.
        faults: one line is added for each key that is unknown or refused, or has a value that cannot be translated;
            these keys are left out of the result.
        file: the values are a whole file, so TRL's defaults for missing keys count too.
        dpo: the stage is dpo.
    """
    taken = {key: comma_list(value) if ALIASES.get(key, key) in _LISTS else value for key, value in values.items()}
    for kind, (what, keys) in _TYPES.items():
        for key in keys.split():
            if not isinstance(values.get(key), (kind, type(None))):
                faults.append(f"{key}: {short(taken.pop(key))} is not {what}.")
    for key in ("model_init_kwargs", "dataset_kwargs", "special_tokens"):
        taken = {**(taken.pop(key, None) or {}), **taken}
    tool = tool_of(taken)
    if file and tool == "LLaMA-Factory" and (stage := taken.get("stage")):
        notes.append(f"stage: {'loss_type=kto' if stage == 'kto' else f'the command zephyr-lite {stage}'} here")
        if stage == "kto":
            taken = {**taken, "stage": "dpo", "loss_type": "kto", "pref_loss": None}
        elif stage not in ("sft", "dpo"):
            faults.append(
                f"stage: {short(stage)}: sft, dpo and kto are trained here; pre-training (pt) is sft on rows with a column text."
            )
    for key, ours in (ALIASES | TRANSLATED).items():
        if key in taken or key in values:
            notes.append(f"{key}: {ours} here")
        if key in ALIASES and key in taken and ours in taken:
            one, other = taken.pop(key), taken[ours]
            if None not in (one, other) and one != other:
                faults.append(f"{key}: {short(one)}, but {ours}: {short(other)}: two names of one key. Keep one.")
            taken[ours] = one if other is None else other
    result: dict[str, Any] = {}
    if not taken.keys().isdisjoint(BATCH_PARTS):
        _batch_size(taken, result, faults, tool)
    if "evaluation_strategy" in taken:  # until transformers 4.41
        taken.setdefault("eval_strategy", taken.pop("evaluation_strategy"))
    if not taken.keys().isdisjoint(_DATASETS):
        _datasets(taken, result, faults, notes)
    strategy = taken.pop("eval_strategy", None)
    if strategy in ("no", False):
        taken["eval_dataset"] = result["eval_dataset"] = None
    elif strategy == "epoch":
        taken["eval_steps"] = None
    elif strategy not in (None, "steps"):
        faults.append(f"eval_strategy: {short(strategy)} is none of no, steps and epoch.")
    assistant, completion = taken.pop("assistant_only_loss", None), taken.pop("completion_only_loss", None)
    if assistant is not None or completion is not None:
        taken.setdefault("loss_on", "last" if completion else "assistant" if assistant else "all")
    if not dpo and taken.get("loss_type") in ("nll", "chunked_nll", ["nll"]):
        del taken["loss_type"]
    for key in ("rl", "pref_loss"):  # Axolotl's and LLaMA-Factory's
        if (loss := taken.pop(key, None)) is not None:
            taken["loss_type"] = "sigmoid" if loss == "dpo" else loss
    for key in SFT_WEIGHTS:
        if weight := taken.pop(key, None):
            losses = taken.get("loss_type") or "sigmoid"
            losses = losses if isinstance(losses, list) else [losses]
            taken["loss_weights"] = [*(taken.get("loss_weights") or [1.0] * len(losses)), weight]
            taken["loss_type"] = [*losses, "sft"]
    hub_id = taken.pop("hub_model_id", None)
    if taken.get("push_to_hub") is True:  # transformers has a switch and a name
        if not hub_id:
            faults.append("push_to_hub: true needs a repository. Set push_to_hub=OWNER/NAME.")
        taken["push_to_hub"] = hub_id
    warmup = number(taken.get("warmup_steps"))
    if warmup is not None and warmup < 1:  # transformers: a share of the steps
        del taken["warmup_steps"]
        if warmup or taken.get("warmup_ratio") is None:
            taken["warmup_ratio"] = warmup
    if taken.pop("lora_target_linear", None):
        taken["lora_target_modules"] = "all-linear"
    no_dropout = taken.pop("disable_dropout", None)
    for key, value in taken.items():
        if key in own or key in ALIASES:
            result[ALIASES.get(key, key)] = value
        elif key in ACCEPTED:
            notes.append(f"{key} changes nothing here: {ACCEPTED[key]}")
        elif key in REFUSED:
            harmless, why = REFUSED[key]
            if not (value is None or value in harmless or number(value) in harmless):
                instead = f", or set it to {harmless[0]!r}" if harmless and harmless[0] not in ("", {}, []) else ""
                faults.append(f"{key}: {short(value)}: {why}. Remove the key{instead}.")
        else:
            faults.append(unknown_key(key, own))
    for key, table in _VALUES.items():
        if key in result and isinstance(result[key], str | int | None):
            result[key] = table.get(result[key], result[key])
    if result.get("lora_target_modules") in (["all-linear"], "all"):  # TRL's command line, LLaMA-Factory
        result["lora_target_modules"] = "all-linear"
    for key in _UNSET:
        if result.get(key, key) is None:
            del result[key]
    # TRL's DPO disables every dropout by default, so the handbook's lora_dropout has no effect there
    if no_dropout or (no_dropout is None and dpo and file and tool == "TRL" and result.get("lora_dropout")):
        notes.append("lora_dropout is 0 here: disable_dropout is on, TRL's default for DPO")
        result["lora_dropout"] = 0
    if file and tool:
        notes.append(f"keys that are not in the file have the defaults of `zephyr-lite keys`, not {tool}'s")
        lora = {"TRL": ("use_peft",), "Axolotl": ("adapter", "lora_r"), "LLaMA-Factory": ()}[tool]
        if lora and not any(map(values.get, lora)):
            notes.append(
                f"the file is for full fine-tuning (no {lora[0]}); a LoRA adapter is trained here, which usually takes ten "
                "times the learning rate"
            )
    return result


def tool_of(values: dict[str, Any]) -> str | None:
    """The tool that a file is for, by its keys; TRL also stands for transformers and the handbook."""
    others = {**_TOOLS, "TRL": TRANSLATED | ACCEPTED | REFUSED}
    return next((tool for tool, keys in others.items() if not values.keys().isdisjoint(keys)), None)


def _batch_size(values: dict[str, Any], result: dict[str, Any], faults: list[str], tool: str | None) -> None:
    """Multiply the micro-batch with the accumulation steps; null is not set."""
    parts = {key: value for key in BATCH_PARTS if (value := values.pop(key, None)) is not None}
    own = sorted(values.keys() & {"batch_size", "train_batch_size"})
    sizes = [number(value) or math.nan for value in parts.values()]
    if not all(size.is_integer() for size in sizes):
        faults.append(f"{', '.join(parts)}: must be whole numbers.")
    elif parts and (own or parts.keys() >= set(BATCH_PARTS[:2])):
        faults.append(f"{', '.join([*own, *parts])}: the batch size is set twice. Keep one.")
    elif list(parts) == [BATCH_PARTS[2]]:
        micro = BATCH_PARTS[tool == "Axolotl"]
        default = " (TRL's default is 8)" if tool == "TRL" else ""
        faults.append(f"{BATCH_PARTS[2]} needs {micro} too{default}. Or set batch_size alone.")
    elif parts:
        result["batch_size"] = int(math.prod(sizes))


def _datasets(values: dict[str, Any], result: dict[str, Any], faults: list[str], notes: list[str]) -> None:
    """Translate TRL's ``dataset_name`` and ``datasets``, the handbook's ``dataset_mixer`` {path: share} and
    ``dataset_mixture``; then the held-out rows and the text column."""
    given = [k for k in ("dataset", "dataset_name", "datasets", "dataset_mixer", "dataset_mixture") if values.get(k)]
    if len(given) > 1:
        faults.append(f"{', '.join(given)}: the data sets are named more than once. Keep one.")
    result |= {key: values.pop(key) for key in ("dataset", "eval_dataset") if key in values}
    theirs = {key: values.pop(key, None) for key in _DATASETS}
    mixer, splits, configs = theirs["dataset_mixer"], theirs["dataset_splits"], theirs["dataset_configs"]
    train, test, column = (theirs[f"dataset_{key}"] for key in ("train_split", "test_split", "text_field"))
    entries, size = theirs["datasets"], theirs["test_split_size"]
    if mixture := theirs["dataset_mixture"]:
        # rows are drawn with the run's seed
        for key in sorted(map(str, mixture.keys() - {"datasets", "test_split_size", "seed"})):
            faults.append(f"there is no key 'dataset_mixture.{key}'.")
        entries, size = mixture.get("datasets"), mixture.get("test_split_size", size)
    if entries:
        result["dataset"] = [spec for entry in entries for spec in _entry(entry, faults)]
    elif mixer or theirs["dataset_name"] is not None:
        specs = [{"path": theirs["dataset_name"], "name": theirs["dataset_config"]}]
        if mixer:
            train, test = (next((s for s in splits or ["train"] if kind in s), None) for kind in ("train", "test"))
            if splits and (train is None or set(splits) - {train, test}):
                faults.append(
                    f"dataset_splits: {short(splits)} is not one split of training and one of test. Write dataset."
                )
            if configs and len(configs) != len(mixer):
                faults.append(f"dataset_configs: {len(configs)} names for {len(mixer)} data sets.")
            names = zip(mixer.items(), configs or [None] * len(mixer))
            specs = [{"path": path, "name": each, "weight": weight} for (path, weight), each in names]
        elif test is None and values.get("eval_strategy") in ("steps", "epoch"):
            test = "test"  # TRL's default
        result["dataset"] = [{**spec, "split": train or "train"} for spec in specs]
        if test:
            result["eval_dataset"] = [{**spec, "split": test, "weight": 1.0} for spec in specs]
    if tests := theirs["test_datasets"]:
        result["eval_dataset"] = [spec for entry in tests for spec in _entry(entry, faults)]
    if (limit := theirs["max_samples"]) is not None:
        if not _specs(result.get("dataset")):
            faults.append("max_samples: limits the rows of dataset, which is not there. Set dataset.limit.")
        for key in ("dataset", "eval_dataset"):
            if specs := _specs(result.get(key)):
                result[key] = [{"limit": limit, **spec} for spec in specs]
    if size is not None:
        _hold_out(size, result, faults, notes)
    if column not in (None, "text", "messages", "conversations"):  # these are found without a name
        if not _specs(result.get("dataset")):
            faults.append("dataset_text_field: names a column of dataset, which is not there. Name both.")
        for key in ("dataset", "eval_dataset"):
            if specs := _specs(result.get(key)):
                named = {"columns": {"text": column}}
                result[key] = [s if isinstance(s.get("columns"), dict) else {**s, **named} for s in specs]


def _specs(value: Any) -> list[dict[str, Any]]:
    """Data sets as keys and values; [] for values that the schema will refuse."""
    entries = [{"path": e} if isinstance(e, str) else e for e in (value if isinstance(value, list) else [value])]
    return entries if all(isinstance(entry, dict) for entry in entries) else []


def _entry(entry: Any, faults: list[str]) -> list[dict[str, Any]]:
    """A data set of a mixture in this project's keys, once for each of its files."""
    if not isinstance(entry, dict):
        faults.append(f"datasets: {short(entry)} is not keys and values such as {{path: a/b, split: train}}.")
        return []
    names = {"id": "path", "config": "name"}  # the handbook's -> ours
    spec = {"split": "train", **{names.get(key, str(key)): value for key, value in entry.items() if value is not None}}
    faults += [
        f"datasets: columns: {column} is given to no chat template here."
        for column in ("tools", "chat_template_kwargs")
        if column in (spec.get("columns") or [])
    ]
    # Axolotl's keys; a format is found by the columns, and a file's kind by its name
    kind, _, turns = (spec.pop(key, None) for key in ("type", "ds_type", "message_property_mappings"))
    if kind is not None and str(kind).partition(".")[0] not in _FORMATS:
        faults.append(
            f"datasets: type: {short(kind)} is none of {', '.join(_FORMATS)}, which are found by the columns."
        )
    if not all(turn in _TURNS for turn in (turns or {}).items()):
        faults.append("datasets: message_property_mappings: a turn has role and content here, or from and value.")
    fields = {ours: spec.pop(f"field_{ours}", None) for ours in ("messages", "chosen", "rejected")}
    if named := {ours: column for ours, column in fields.items() if column not in (None, ours)}:
        spec["columns"] = named
    files = spec.pop("data_files", None)
    if not files:
        return [spec]
    files = [files] if isinstance(files, str) else files
    if spec.get("path") not in ("json", "csv", "parquet") or not isinstance(files, list):
        faults.append("datasets: data_files are read as path: json, csv or parquet, and a file or a list of files.")
        return []
    return [{**spec, "path": file} for file in files]


def _hold_out(size: Any, result: dict[str, Any], faults: list[str], notes: list[str]) -> None:
    """``test_split_size`` rows of the mixture (a share, below 1) become ``eval_dataset``."""
    rows, specs = number(size), _specs(result.get("dataset"))
    if rows is None or not 0 < rows < math.inf or (rows >= 1 and rows != int(rows)):
        faults.append(f"test_split_size: {short(size)} is neither a share below 1 nor a number of rows.")
    elif not specs:
        faults.append("test_split_size: holds rows of dataset out, which is not there. Name both.")
    else:
        share = rows if rows < 1 else math.ceil(rows / len(specs))
        result["dataset"] = [{**spec, "test_size": share} for spec in specs]
        # a number of held-out rows does not scale with the data set's weight
        own = {} if rows < 1 else {"weight": 1.0}
        result["eval_dataset"] = [{**spec, **own, "part": "test"} for spec in result["dataset"]]
        if rows >= 1 and len(specs) > 1:
            notes.append(f"test_split_size {size}: {share:,} of each data set")


def number(value: Any) -> float | None:
    """A number, also one that YAML reads as a text (1e-8); None for anything else."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def unknown_key(key: str, own: Collection[str]) -> str:
    """The message for an unknown key, with the nearest known one."""
    options = {"dryrun": "--dry-run", "config": "--config", "verbose": "--verbose"}
    near = [options[name] for name in difflib.get_close_matches(key[:100].replace("_", ""), options, n=1, cutoff=0.75)]
    if not near:
        known = [*own, *([] if "." in key else [*ALIASES, *TRANSLATED])]
        near = [repr(name) for name in difflib.get_close_matches(key[:100], known, n=1, cutoff=0.6)]
    return f"there is no key {short(key)}.{f' Did you mean {near[0]}?' if near else ''}"
