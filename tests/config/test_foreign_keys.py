"""YAML files of TRL, the alignment handbook, LLaMA-Factory and Axolotl: a verdict on every field of TRL, and recipes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml
from trl import DatasetMixtureConfig, DPOConfig, KTOConfig, ModelConfig, ScriptArguments, SFTConfig

from zephyr_lite.config.foreign_keys import ACCEPTED, ALIASES, REFUSED, TRANSLATED
from zephyr_lite.config.load import RunConfig, dump_config, load_config
from zephyr_lite.errors import UserError

FIELDS = {
    field.name: field
    for config in (KTOConfig, SFTConfig, DPOConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig)
    for field in dataclasses.fields(config)
}


def load(tmp_path, text, method="sft", *words):
    path = tmp_path / "theirs.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return load_config(method, str(path), list(words))


def refused(tmp_path, text, method="sft"):
    with pytest.raises(UserError) as told:
        load(tmp_path, text, method)
    assert str(tmp_path / "theirs.yaml") in str(told.value)
    return str(told.value)


# -- every field of TRL ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_field_of_the_installed_trl_has_one_verdict(name):
    mapped = name in RunConfig.model_fields or name in ALIASES or name in TRANSLATED
    verdicts = [mapped, name in ACCEPTED, name in REFUSED]
    assert sum(verdicts) == 1, f"TRL's {name}: decide in foreign_keys.py whether it is mapped, accepted or refused"


def test_no_key_has_two_verdicts():
    tables = [ALIASES, TRANSLATED, ACCEPTED, REFUSED, RunConfig.model_fields]
    assert len(set().union(*tables)) == sum(map(len, tables))


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(FIELDS)))
def test_a_refused_field_is_taken_at_its_default_only(name, tmp_path):
    default = FIELDS[name].default
    load(tmp_path, {name: default}, "dpo")
    load(tmp_path, {name: None}, "dpo")
    message = refused(tmp_path, {name: "something else"}, "dpo")
    assert f"{name}: 'something else': " in message and "Remove the key" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("datasets: [a/b]", "datasets: 'a/b' is not keys and values such as"),
        ("dataset_mixer: {a/b: 1, c/d: 1}\ndataset_configs: [x]", "dataset_configs: 1 names for 2 data sets"),
        ("dataset: a/b\ntest_split_size: many", "test_split_size: 'many' is neither a share below 1 nor a number"),
        ("test_split_size: 100", "test_split_size: holds rows of dataset out, which is not there"),
        ("dataset_text_field: content", "dataset_text_field: names a column of dataset, which is not there"),
        ("datasets: [{path: a/b, fraction: 0.5}]", "there is no key 'dataset.fraction'"),
        ("datasets: [{path: a/b, data_files: x.json}]", "data_files are read as path: json, csv or parquet"),
        ("datasets: [{path: a/b, columns: [messages, tools]}]", "columns: tools is given to no chat template"),
        ("assistant_only_loss: perhaps", "assistant_only_loss: 'perhaps' is not true or false"),
        ("loss_type: [sigmoid, sft]\nloss_weights: [1]", "loss_weights: expected 2 numbers, one for each loss"),
        ("rpo_alpha: much", "loss_weights.1: expected a number"),
        ("model_init_kwargs: {attn_implementation: sdpa, quantization_config: {bits: 3}}", "quantization_config"),
        ("dataset_kwargs: {skip_prepare_dataset: true}", "skip_prepare_dataset: True"),
        ("max_seq_length: 4096\nmax_length: 1024", "max_seq_length: 4096, but max_length: 1024: two names of one key"),
        ("batch_size: 64\nper_device_train_batch_size: 4", "the batch size is set twice"),
        ("gradient_accumulation_steps: 16", "gradient_accumulation_steps needs per_device_train_batch_size"),
        ("per_device_train_batch_size: 2.5", "per_device_train_batch_size: must be whole numbers"),
        ("dataset: a/b\ndataset_name: c/d", "dataset, dataset_name: the data sets are named more than once"),
        ("dataset_name: a/b\neval_strategy: stpes", "eval_strategy: 'stpes' is none of no, steps and epoch"),
        ("dataset_mixer: {a/b: 1}\ndataset_splits: [train_sft, train_gen, test_sft]", "is not one split of training"),
    ],
)
def test_what_cannot_be_translated_names_the_key(text, says, tmp_path):
    assert says in refused(tmp_path, text)


# -- data sets -------------------------------------------------------------------------------------------------------------


def test_the_handbooks_mixture(tmp_path):
    text = """
dataset_mixture:
  datasets:
  - {id: a/x, config: default, split: train_sft, columns: [messages], weight: 1.0}
  - {id: b/y, weight: 0.25}
  test_split_size: 1000
  seed: 0
"""
    loaded = load(tmp_path, text)
    x, y = loaded.config.dataset
    assert (x.path, x.name, x.split, x.columns, x.weight) == ("a/x", "default", "train_sft", ["messages"], 1)
    assert (y.path, y.name, y.split, y.columns, y.weight) == ("b/y", None, "train", {}, 0.25)
    assert [(s.test_size, s.part) for s in loaded.config.dataset] == [(500, "train")] * 2
    # so many rows are so many: of b/y as well, of which a quarter is trained on
    assert [(s.path, s.test_size, s.part, s.weight) for s in loaded.config.eval_dataset] == [
        ("a/x", 500, "test", 1),
        ("b/y", 500, "test", 1),
    ]
    assert any("test_split_size 1000" in note and "500 of each data set" in note for note in loaded.notes)
    again = RunConfig.model_validate(yaml.safe_load(dump_config(loaded.config)))
    assert again == loaded.config


def test_trl_evaluates_on_the_split_test_where_it_evaluates(tmp_path):
    assert load(tmp_path, "dataset_name: a/b\n").config.eval_dataset == []
    for strategy in ("eval_strategy", "evaluation_strategy"):
        config = load(tmp_path, f"dataset_name: a/b\n{strategy}: steps\n").config
        assert config.eval_dataset[0].split == "test"
    assert load(tmp_path, "dataset_name: a/b\neval_strategy: epoch\neval_steps: 50\n").config.eval_steps is None
    assert load(tmp_path, "dataset_name: a/b\neval_strategy: 'no'\ndataset_test_split: x\n").config.eval_dataset == []


@pytest.mark.parametrize(
    ("field", "columns"), [("text", {}), ("messages", {}), ("conversations", {}), ("story", {"text": "story"})]
)
def test_dataset_text_field(field, columns, tmp_path):
    loaded = load(tmp_path, f"dataset_name: a/b\ndataset_test_split: test\ndataset_text_field: {field}\n")
    assert loaded.config.dataset[0].columns == loaded.config.eval_dataset[0].columns == columns
    assert any("dataset_text_field" in note for note in loaded.notes)


# -- values ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps", "ratio"),
    [
        ("warmup_steps: 100", 100, 0.1),
        ("warmup_steps: 0.05", None, 0.05),
        ("warmup_steps: 0", None, 0),
        ("warmup_steps: 0\nwarmup_ratio: null", None, 0),
        ("warmup_steps: 0\nwarmup_ratio: 0.2", None, 0.2),  # transformers takes the steps only where there are some
        ("warmup_steps: 30\nwarmup_ratio: 0.2", 30, 0.2),
        ("warmup_ratio: 0.2", None, 0.2),
    ],
)
def test_warm_up(text, steps, ratio, tmp_path):
    config = load(tmp_path, text).config
    assert (config.warmup_steps, config.warmup_ratio) == (steps, ratio)


def test_a_part_of_the_batch_on_the_command_line_keeps_the_files_other(tmp_path):
    theirs = "per_device_train_batch_size: 4\ngradient_accumulation_steps: 4\n"
    assert load(tmp_path, theirs, "sft", "per_device_train_batch_size=2").config.batch_size == 8
    assert load(tmp_path, theirs, "sft", "--gradient_accumulation_steps", "1").config.batch_size == 4
    assert load(tmp_path, theirs, "sft", "batch_size=3").config.batch_size == 3
    assert load(tmp_path, "batch_size: 8\n", "sft", "per_device_train_batch_size=2").config.batch_size == 2


@pytest.mark.parametrize("key", ["per_device_train_batch_size", "chat_template_path", "model_revision", "warmup_ratio"])
def test_null_is_not_set(key, tmp_path):
    assert load(tmp_path, f"{key}: null\nwarmup_steps: null\n").config == RunConfig()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optim: adamw_bnb_8bit", "optim", "adamw_8bit"),
        ("optim: adamw_torch_fused", "optim", "adamw_torch"),
        ("torch_dtype: null", "dtype", "auto"),
        ("save_total_limit: null", "save_total_limit", 2),
        ("lora_target_modules: [all-linear]", "lora_target_modules", "all-linear"),
        ("lora_target: q_proj,v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("lora_target: all\ncutoff_len: 512", "lora_target_modules", "all-linear"),
        ("lora_rank: 8\nnum_epochs: 3.0\nlr: 1e-4", "num_train_epochs", 3),
        ("lr_scheduler: linear\nuse_rslora: null\nadam_beta2:", "lr_scheduler_type", "linear"),
        ("peft_use_rslora: true\nloraplus_lr_embedding: 1e-6", "use_rslora", True),
        ("loraplus_lr_ratio: 16\nadam_epsilon: 1e-6", "loraplus_lr_ratio", 16),
        ("max_grad_norm: 0", "max_grad_norm", 0),
        (
            "lr_scheduler_kwargs: {min_lr: 1e-6, decay_type: linear}",
            "lr_scheduler_kwargs",
            {"min_lr": 1e-6, "decay_type": "linear"},
        ),
        ("lr_scheduler_kwargs: ''", "lr_scheduler_kwargs", {}),
        ("neftune_noise_alpha: 5", "neftune_noise_alpha", 5),
        ("completion_only_loss: true", "loss_on", "last"),
        ("completion_only_loss: false", "loss_on", "all"),
        ("completion_only_loss: null", "loss_on", "assistant"),
        ("assistant_only_loss: true\ncompletion_only_loss: true", "loss_on", "last"),
        ("loss_type: nll", "loss_type", "sigmoid"),
        ("loss_type: [ipo]", "loss_type", "ipo"),
        ("loss_type: [sigmoid, sft]\nloss_weights: [1, 0.2]", "losses", {"sigmoid": 1, "sft": 0.2}),
        ("loss_type: [ipo]\nrpo_alpha: 0.2", "losses", {"ipo": 1, "sft": 0.2}),
        ("pref_loss: simpo\npref_ftx: 0.5\nsimpo_gamma: 0.8", "losses", {"simpo": 1, "sft": 0.5}),
        ("pref_loss: orpo\npref_beta: 0.2\npref_ftx: 0.0", "beta", 0.2),
        ("rl: dpo\nrl_beta: 0.1\ndpo_label_smoothing: 0.1", "loss_type", "sigmoid"),
        ("rl: orpo\norpo_alpha: 0.25", "beta", 0.25),
        ("rl: kto\nkto_undesirable_weight: 1.5", "undesirable_weight", 1.5),
        ("pref_loss: kto\nkto_chosen_weight: 2.0", "desirable_weight", 2.0),
        ("chat_template_path: x.jinja", "chat_template", "x.jinja"),
        ("model_init_kwargs: {torch_dtype: bf16, revision: v2, use_cache: false}", "dtype", "bfloat16"),
        ("model_init_kwargs: {revision: v2}", "model_revision", "v2"),
        ("dataset_kwargs: {add_special_tokens: false, append_concat_token: false}", "seed", 42),
        ("push_to_hub: true\nhub_model_id: me/x\nhub_private_repo: true", "hub_private_repo", True),
    ],
)
def test_values_that_have_another_name_here(text, key, value, tmp_path):
    assert getattr(load(tmp_path, text).config, key) == value


def test_dpo_has_no_noise(tmp_path):
    loaded = load(tmp_path, "neftune_noise_alpha: 5", "dpo")
    assert loaded.config.neftune_noise_alpha is None
    assert "neftune_noise_alpha changes nothing here: only sft reads it" in loaded.notes


def test_dpo_has_no_dropout_unless_the_file_says_so(tmp_path):
    theirs = "use_peft: true\nlora_dropout: 0.05\n"
    loaded = load(tmp_path, theirs, "dpo")
    assert loaded.config.lora_dropout == 0 and any("disable_dropout" in note for note in loaded.notes)
    assert load(tmp_path, theirs + "disable_dropout: false\n", "dpo").config.lora_dropout == 0.05
    assert load(tmp_path, "lora_dropout: 0.05\n", "dpo").config.lora_dropout == 0.05  # a file of our own
    assert load(tmp_path, theirs, "sft").config.lora_dropout == 0.05
    assert load(tmp_path, theirs + "disable_dropout: true\n", "sft").config.lora_dropout == 0


# -- the handbook's recipes ------------------------------------------------------------------------------------------------

# what all of them have
COMMON = """
bf16: true
gradient_checkpointing: true
log_level: info
lr_scheduler_type: cosine
num_train_epochs: 1
seed: 42
torch_dtype: bfloat16
"""
SFT = (
    COMMON
    + """
attn_implementation: flash_attention_2
dataset_num_proc: 12
do_eval: true
eval_strategy: epoch
gradient_checkpointing_kwargs: {use_reentrant: false}
hub_strategy: every_save
learning_rate: 2.0e-05
logging_steps: 5
logging_strategy: steps
max_steps: -1
overwrite_output_dir: true
per_device_eval_batch_size: 8
push_to_hub: true
remove_unused_columns: true
report_to: [tensorboard, wandb]
save_strategy: "steps"
save_steps: 100
save_total_limit: 1
warmup_ratio: 0.1
"""
)
DPO = (
    COMMON
    + """
dataset_num_proc: 12
do_eval: true
eval_strategy: steps
eval_steps: 100
gradient_checkpointing_kwargs: {use_reentrant: false}
logging_steps: 10
max_length: 1024
max_prompt_length: 512
optim: adamw_torch
per_device_eval_batch_size: 8
push_to_hub: true
save_strategy: "no"
warmup_ratio: 0.1
"""
)
LORA = """
load_in_4bit: true
use_peft: true
lora_r: 16
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
"""
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
)


def mixture(*sets, columns, size=None):
    entries = [
        {"id": name, "config": "default", "split": split, "columns": columns, "weight": weight}
        for name, split, weight in sets
    ]
    return {"dataset_mixture": {"datasets": entries, **({"test_split_size": size} if size else {}), "seed": 0}}


def recipe(shared, batch, **keys):
    values = {**yaml.safe_load(shared), "hub_model_id": "some-model", "output_dir": "data/some-model", **keys}
    return {**values, **dict(zip(("per_device_train_batch_size", "gradient_accumulation_steps"), batch))}


ULTRACHAT = [("HuggingFaceH4/ultrachat_200k", "train_sft", 1.0), ("HuggingFaceH4/ultrachat_200k", "test_sft", 1.0)]
MISTRAL = "mistralai/Mistral-7B-v0.1"

# name -> (method, keys and values, what it resolves to)
RECIPES = {
    "zephyr-7b-beta/sft/config_qlora": (
        "sft",
        recipe(SFT + LORA, (4, 2), model_name_or_path=MISTRAL, max_length=2048, chat_template=TEMPLATE)
        | {"learning_rate": 2e-4, "model_revision": "main"}
        | mixture(*ULTRACHAT, columns=["messages"], size=1000),
        {"batch_size": 8, "learning_rate": 2e-4, "lora_r": 16, "lora_dropout": 0.05, "held_out": [500, 500]},
    ),
    "zephyr-7b-beta/dpo/config_qlora, until 2025": (
        "dpo",
        recipe(DPO + LORA, (4, 4), model_name_or_path="alignment-handbook/zephyr-7b-sft-qlora", beta=0.01)
        | {"dataset_mixer": {"HuggingFaceH4/ultrafeedback_binarized": 1.0}, "preprocessing_num_workers": 12}
        | {"dataset_splits": ["train_prefs", "test_prefs"]},
        {"batch_size": 16, "lora_dropout": 0, "held_out": [None]},
    ),
    "smollm2/sft/config": (
        "sft",
        recipe(SFT, (4, 4), model_name_or_path="HuggingFaceTB/SmolLM2-1.7B", max_length=8192, chat_template=TEMPLATE)
        | {"dataset_name": "HuggingFaceTB/smoltalk", "dataset_config": "all", "save_strategy": "no"}
        | {"dataset_train_split": "train", "dataset_test_split": "test"},
        {"batch_size": 16, "max_length": 8192, "held_out": [None]},
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_the_handbook_runs_as_it_is(name, tmp_path):
    method, values, wanted = RECIPES[name]
    loaded = load(tmp_path, values, method)
    found = {key: getattr(loaded.config, key) for key in wanted if key != "held_out"}
    assert found | {"held_out": [spec.test_size for spec in loaded.config.eval_dataset]} == wanted
    assert loaded.config.model_name_or_path == values["model_name_or_path"]
    assert loaded.config.push_to_hub == "some-model"
    assert any("full fine-tuning" in note for note in loaded.notes) == ("use_peft" not in values)


# -- LLaMA-Factory and Axolotl ---------------------------------------------------------------------------------------------

LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen2.5-7B
trust_remote_code: true
quantization_bit: 4
quantization_method: bnb
stage: kto
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
lora_dropout: 0.1
pref_beta: 0.2
dataset: a.jsonl,b.jsonl
dataset_dir: data
template: qwen
cutoff_len: 256
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/x
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
val_size: 0.1
"""
AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
model_type: AutoModelForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
strict: false
rl: dpo
chat_template: tokenizer_default
datasets:
  - path: a/b
    type: chat_template.default
    field_messages: conversation
    field_chosen: chosen
    field_rejected: worse
    message_property_mappings: {role: from, content: value}
  - {path: json, ds_type: json, data_files: rows.jsonl, type: alpaca}
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/out
adapter: qlora
lora_model_dir:
sequence_len: 512
sample_packing: true
eval_sample_packing: false
pad_to_sequence_len: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_fan_in_fan_out:
wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
early_stopping_patience:
resume_from_checkpoint:
local_rank:
logging_steps: 1
xformers_attention:
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
eval_table_size:
saves_per_epoch: 1
debug:
deepspeed:
weight_decay: 0.0
fsdp:
fsdp_config:
special_tokens:
  pad_token: "<|end_of_text|>"
"""


def test_a_file_of_llama_factory(tmp_path):
    loaded = load(tmp_path, LLAMA_FACTORY + "pref_loss: sigmoid\n", "dpo")
    config, notes = loaded.config, "\n".join(loaded.notes)
    assert (config.stage, config.loss_type, config.beta, config.lora_r, config.max_length) == (
        "dpo",
        "kto",
        0.2,
        8,
        256,
    )
    assert [(s.path, s.limit, s.val_size) for s in config.dataset] == [("a.jsonl", 1000, 0.1), ("b.jsonl", 1000, 0.1)]
    assert (config.batch_size, config.lora_dropout) == (8, 0.1)
    assert "stage: loss_type=kto here" in notes and "not LLaMA-Factory's" in notes
    assert "TRL" not in notes and "fine-tuning" not in notes
    assert "stage: kto: this file is for zephyr-lite dpo" in refused(tmp_path, LLAMA_FACTORY)
    assert load(tmp_path, LLAMA_FACTORY.replace("stage: kto", "stage: sft")).config.stage == "sft"
    assert load(tmp_path, "stage: kto\nbeta: 0.1\n", "dpo").config.stage == "kto"  # a file of our own


def test_a_file_of_axolotl(tmp_path):
    loaded = load(tmp_path, AXOLOTL, "dpo")
    config, notes = loaded.config, "\n".join(loaded.notes)
    assert [(s.path, s.columns) for s in config.dataset] == [
        ("a/b", {"messages": "conversation", "rejected": "worse"}),
        ("rows.jsonl", {}),
    ]
    assert (config.loss_type, config.batch_size, config.lora_dropout) == ("sigmoid", 8, 0.05)
    assert (config.optim, config.chat_template, config.max_length) == ("paged_adamw_8bit", "auto", 512)
    assert "not Axolotl's" in notes and "TRL" not in notes and "fine-tuning" not in notes
    full = AXOLOTL.replace("adapter: qlora\n", "").replace("lora_r: 8\n", "")
    assert any("full fine-tuning (no adapter)" in note for note in load(tmp_path, full, "dpo").notes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stage: rm\nfinetuning_type: lora", "stage: 'rm': sft, dpo and kto are trained here"),
        (
            "finetuning_type: full",
            "finetuning_type: 'full': only plain LoRA is trained. Remove the key, or set it to 'lora'",
        ),
        ("quantization_bit: 8", "quantization_bit: 8: a base is held in 4 bits"),
        ("max_samples: many\ndataset: a.jsonl", "max_samples: 'many' is not a whole number"),
        ("max_samples: 5", "max_samples: limits the rows of dataset, which is not there"),
        ("sequence_len: 8\ngradient_accumulation_steps: 4", "needs micro_batch_size too. Or set batch_size alone"),
        ("micro_batch_size: 2\nper_device_train_batch_size: 2", "the batch size is set twice"),
        ("special_tokens: {eos_token: x}", "eos_token: 'x': answers end as the chat template ends them"),
        ("datasets: [{path: a/b, type: {format: x}}]", "is none of chat_template"),
        ("datasets: [{path: a/b, message_property_mappings: {role: speaker}}]", "a turn has role and content here"),
        ("max_completion_length: 256", "max_completion_length: 256: an answer is cut only where"),
        ("is_encoder_decoder: true", "only decoder models are trained"),
    ],
)
def test_what_would_change_training_is_refused_with_the_reason(text, says, tmp_path):
    assert says in refused(tmp_path, text) and "Did you mean" not in refused(tmp_path, text)


# -- rows ----------------------------------------------------------------------------------------------------------------------


def test_rows_that_are_held_out_are_not_trained_on(tmp_path):
    from zephyr_lite.data.load import load_rows

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(40)))
    config = load_config("sft", None, [f"dataset={rows}", "test_split_size=6"]).config
    train, test = (
        {row["messages"][0]["content"] for row in load_rows(specs, "sft", seed=seed).values()}
        for specs, seed in ((config.dataset, 1), (config.eval_dataset, 2))
    )
    assert len(train) == 34 and len(test) == 6 and not train & test
    every = load_config("sft", None, [f"dataset={rows}", "test_split_size=40"]).config
    with pytest.raises(UserError, match="test_size 40 holds out 40 of 40 rows"):
        load_rows(every.dataset, "sft", seed=0)


def test_a_file_for_full_fine_tuning_is_told_that_an_adapter_is_trained(tmp_path):
    full = "per_device_train_batch_size: 4\nlearning_rate: 2.0e-5\n"
    assert any("full fine-tuning" in note for note in load(tmp_path, full).notes)
    assert not any("full fine-tuning" in note for note in load(tmp_path, full + "use_peft: true\n").notes)
    assert not any("TRL" in note for note in load(tmp_path, "learning_rate: 2.0e-5\n").notes)
