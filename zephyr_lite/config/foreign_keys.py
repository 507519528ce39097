"""Keys of the YAML files of TRL, transformers, the alignment handbook, LLaMA-Factory and Axolotl, with what becomes of each.

Every field of TRL's configuration classes has one verdict, and a test compares the tables with the installed TRL: it is
a key here, or translated (``ALIASES``, ``TRANSLATED``); it has no effect here (``ACCEPTED``); or it would change the
training, and only the values that do not are accepted (``REFUSED``).
"""

from __future__ import annotations

from typing import Any

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
DATASETS = {
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
    **DATASETS,
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
TOOLS = {
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
