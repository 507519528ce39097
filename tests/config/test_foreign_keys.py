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


def test_every_field_of_the_installed_trl_has_one_verdict():
    """Mapped, accepted or refused, in foreign_keys.py."""
    tables = [ALIASES, TRANSLATED, ACCEPTED, REFUSED, RunConfig.model_fields]
    known = set().union(*tables)
    assert len(known) == sum(map(len, tables)) and FIELDS.keys() <= known


def test_a_refused_field_is_taken_at_its_default_only(tmp_path):
    for name in sorted(set(REFUSED) & set(FIELDS)):
        for taken in (FIELDS[name].default, None):
            load(tmp_path, {name: taken}, "dpo")
        message = refused(tmp_path, {name: "something else"}, "dpo")
        assert f"{name}: 'something else': " in message and "Remove the key" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dataset_mixer: {a/b: 1, c/d: 1}\ndataset_configs: [x]", "dataset_configs: 1 names for 2 data sets"),
        ("datasets: [{path: a/b, fraction: 0.5}]", "there is no key 'dataset.fraction'"),
        ("loss_type: [sigmoid, sft]\nloss_weights: [1]", "loss_weights: expected 2 numbers, one for each loss"),
        ("rpo_alpha: much", "loss_weights.1: expected a number"),
        ("dataset_kwargs: {skip_prepare_dataset: true}", "skip_prepare_dataset: True"),
        ("max_seq_length: 4096\nmax_length: 1024", "max_seq_length: 4096, but max_length: 1024: two names of one key"),
        ("gradient_accumulation_steps: 16", "gradient_accumulation_steps needs per_device_train_batch_size"),
        ("dataset: a/b\ndataset_name: c/d", "dataset, dataset_name: the data sets are named more than once"),
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


@pytest.mark.parametrize(("field", "columns"), [("text", {}), ("story", {"text": "story"})])
def test_dataset_text_field(field, columns, tmp_path):
    loaded = load(tmp_path, f"dataset_name: a/b\ndataset_test_split: test\ndataset_text_field: {field}\n")
    assert loaded.config.dataset[0].columns == loaded.config.eval_dataset[0].columns == columns
    assert any("dataset_text_field" in note for note in loaded.notes)


# -- values ------------------------------------------------------------------------------------------------------------------


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
        ("warmup_steps: 100", "warmup_steps", 100),
        ("warmup_steps: 0.05", "warmup_ratio", 0.05),
        ("warmup_steps: 0", "warmup_ratio", 0),
        ("warmup_steps: 0\nwarmup_ratio: 0.2", "warmup_ratio", 0.2),
        ("optim: adamw_bnb_8bit", "optim", "adamw_8bit"),
        ("report_to: [none]", "report_to", []),
        ("push_to_hub: false", "push_to_hub", None),
        ("lora_target_modules: [all-linear]", "lora_target_modules", "all-linear"),
        ("lora_target: q_proj,v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("lora_rank: 8\nnum_epochs: 3.0\nlr: 1e-4", "num_train_epochs", 3),
        ("peft_use_rslora: true\nloraplus_lr_embedding: 1e-6", "use_rslora", True),
        (
            "lr_scheduler_kwargs: {min_lr: 1e-6, decay_type: linear}",
            "lr_scheduler_kwargs",
            {"min_lr": 1e-6, "decay_type": "linear"},
        ),
        ("completion_only_loss: true", "loss_on", "last"),
        ("completion_only_loss: false", "loss_on", "all"),
        ("loss_type: [sigmoid, sft]\nloss_weights: [1, 0.2]", "losses", {"sigmoid": 1, "sft": 0.2}),
        ("pref_loss: simpo\npref_ftx: 0.5\nsimpo_gamma: 0.8", "losses", {"simpo": 1, "sft": 0.5}),
        ("pref_loss: orpo\npref_beta: 0.2\npref_ftx: 0.0", "beta", 0.2),
        ("rl: orpo\norpo_alpha: 0.25", "beta", 0.25),
        ("rl: kto\nkto_undesirable_weight: 1.5", "undesirable_weight", 1.5),
        ("chat_template_path: x.jinja", "chat_template", "x.jinja"),
        ("model_init_kwargs: {torch_dtype: bf16, revision: v2, use_cache: false}", "dtype", "bfloat16"),
        ("push_to_hub: true\nhub_model_id: me/x\nhub_private_repo: true", "hub_private_repo", True),
    ],
)
def test_values_that_have_another_name_here(text, key, value, tmp_path):
    assert getattr(load(tmp_path, text).config, key) == value


def test_dpo_has_no_dropout_unless_the_file_says_so(tmp_path):
    theirs = "use_peft: true\nlora_dropout: 0.05\n"
    loaded = load(tmp_path, theirs, "dpo")
    assert loaded.config.lora_dropout == 0 and any("disable_dropout" in note for note in loaded.notes)
    assert load(tmp_path, theirs + "disable_dropout: false\n", "dpo").config.lora_dropout == 0.05
    assert load(tmp_path, "lora_dropout: 0.05\n", "dpo").config.lora_dropout == 0.05  # a file of our own
    assert load(tmp_path, theirs, "sft").config.lora_dropout == 0.05
    assert load(tmp_path, theirs + "disable_dropout: true\n", "sft").config.lora_dropout == 0


# -- the handbook's recipes ------------------------------------------------------------------------------------------------

COMMON = yaml.safe_load("""
{bf16: true, torch_dtype: bfloat16, load_in_4bit: true, use_peft: true, lora_r: 16, lora_alpha: 16, lora_dropout: 0.05,
 lora_target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj], push_to_hub: true,
 hub_model_id: some-model, output_dir: data/some-model, per_device_train_batch_size: 4, max_steps: -1}
""")
TEMPLATE = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
SETS = [
    {"id": "HuggingFaceH4/ultrachat_200k", "config": "default", "split": split, "columns": ["messages"], "weight": 1.0}
    for split in ("train_sft", "test_sft")
]


# name -> (method, keys and values, what it resolves to)
RECIPES = {
    "zephyr-7b-beta/sft/config_qlora": (
        "sft",
        {"model_name_or_path": "mistralai/Mistral-7B-v0.1", "chat_template": TEMPLATE, "learning_rate": 2e-4}
        | {"gradient_accumulation_steps": 2, "eval_strategy": "epoch", "report_to": ["tensorboard", "wandb"]}
        | {"dataset_mixture": {"datasets": SETS, "test_split_size": 1000, "seed": 0}},
        {"batch_size": 8, "learning_rate": 2e-4, "lora_r": 16, "lora_dropout": 0.05, "held_out": [500, 500]},
    ),
    "zephyr-7b-beta/dpo/config_qlora, until 2025": (
        "dpo",
        {"model_name_or_path": "alignment-handbook/zephyr-7b-sft-qlora", "gradient_accumulation_steps": 4}
        | {"eval_strategy": "steps", "save_strategy": "no", "beta": 0.01, "max_prompt_length": 512}
        | {"dataset_mixer": {"HuggingFaceH4/ultrafeedback_binarized": 1.0}}
        | {"dataset_splits": ["train_prefs", "test_prefs"]},
        {"batch_size": 16, "lora_dropout": 0, "held_out": [None]},
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_the_handbook_runs_as_it_is(name, tmp_path):
    method, values, wanted = RECIPES[name]
    loaded = load(tmp_path, COMMON | values, method)
    found = {key: getattr(loaded.config, key) for key in wanted if key != "held_out"}
    assert found | {"held_out": [spec.test_size for spec in loaded.config.eval_dataset]} == wanted
    assert loaded.config.model_name_or_path == values["model_name_or_path"]
    assert loaded.config.push_to_hub == "some-model"
    assert not any("full fine-tuning" in note for note in loaded.notes)


# -- LLaMA-Factory and Axolotl ---------------------------------------------------------------------------------------------

LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen2.5-7B
quantization_bit: 4
stage: kto
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
lora_dropout: 0.1
pref_beta: 0.2
dataset: a.jsonl,b.jsonl
template: qwen
cutoff_len: 256
max_samples: 1000
output_dir: saves/x
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
ddp_timeout: 180000000
resume_from_checkpoint: null
val_size: 0.1
"""
AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
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
val_set_size: 0.1
output_dir: ./outputs/out
adapter: qlora
sequence_len: 512
lora_r: 8
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: paged_adamw_8bit
lr_scheduler: cosine
train_on_inputs: false
fp16:
evals_per_epoch: 4
special_tokens:
  pad_token: "<|end_of_text|>"
"""


def test_a_file_of_llama_factory(tmp_path):
    loaded = load(tmp_path, LLAMA_FACTORY + "pref_loss: sigmoid\n", "dpo")
    config, notes = loaded.config, "\n".join(loaded.notes)
    assert (config.stage, config.loss_type, config.beta, config.lora_r) == ("dpo", "kto", 0.2, 8)
    assert [(s.path, s.limit, s.val_size) for s in config.dataset] == [("a.jsonl", 1000, 0.1), ("b.jsonl", 1000, 0.1)]
    assert (config.batch_size, config.lora_dropout) == (8, 0.1)
    assert (
        "stage → loss_type=kto, cutoff_len → max_length" in notes
        and len(loaded.notes) == 3
        and "not LLaMA-Factory's" in notes
    )
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
        ("sequence_len: 8\ngradient_accumulation_steps: 4", "needs micro_batch_size too. Or set batch_size alone"),
        ("datasets: [{path: a/b, message_property_mappings: {role: speaker}}]", "a turn has role and content here"),
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
