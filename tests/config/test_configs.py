"""Every shipped configuration: its facts are the recipe's, and it runs, in small, on a tiny model."""

from __future__ import annotations

import pytest
import yaml

from zephyr_lite.config.load import DPO_DEFAULTS, RunConfig, load_config, preset_configs
from zephyr_lite.config.resolve import INHERITED
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft

SFT = yaml.safe_load("""
{stage: sft, model_name_or_path: mistralai/Mistral-7B-v0.1, load_in_4bit: true, max_length: 2048, loss_on: assistant,
 batch_size: 8, num_train_epochs: 1, learning_rate: 2.0e-4, lr_scheduler_type: cosine, warmup_ratio: 0.1, seed: 42,
 optim: adamw_torch, weight_decay: 0, lora_r: 16, lora_alpha: 16, lora_dropout: 0.05, lora_target_modules: all-linear}
""")
DPO = SFT | yaml.safe_load("""
{stage: dpo, max_length: 1024, max_prompt_length: 512, batch_size: 16, learning_rate: 5.0e-6, optim: paged_adamw_32bit,
 lora_r: 128, lora_alpha: 128, lora_dropout: 0, beta: 0.01, loss_type: sigmoid}
""")
PAPER = DPO | yaml.safe_load("""
{stage: paper-dpo, beta: 0.1, learning_rate: 5.0e-7, lr_scheduler_type: linear, num_train_epochs: 3, batch_size: 32}
""")
ULTRACHAT, ULTRAFEEDBACK = "HuggingFaceH4/ultrachat_200k", "HuggingFaceH4/ultrafeedback_binarized"
# name -> (facts, data set, its split, its limit)
FACTS = {
    "zephyr-7b/sft": (SFT, ULTRACHAT, "train_sft", None),
    "zephyr-7b/dpo": (DPO, ULTRAFEEDBACK, "train_prefs", None),
    "zephyr-7b/overnight-sft": (SFT, ULTRACHAT, "train_sft", 6000),
    "zephyr-7b/overnight-dpo": (DPO, ULTRAFEEDBACK, "train_prefs", 10000),
    "zephyr-7b/paper-dpo": (PAPER, ULTRAFEEDBACK, "train_prefs", None),
}
ABLATIONS = {
    "ablations/dsft-1": (SFT | {"stage": "dsft-1"}, ULTRACHAT, "train_sft", None),
    "ablations/dsft-2": (SFT | {"stage": "dsft-2"}, ULTRAFEEDBACK, "train_prefs", None),
    "ablations/ddpo": (DPO | {"stage": "ddpo"}, ULTRAFEEDBACK, "train_prefs", None),
    "ablations/ddpo-alone": (DPO | {"stage": "ddpo-alone", "adapters": "none"}, ULTRAFEEDBACK, "train_prefs", None),
    "ablations/alpha-dsft": (SFT | {"stage": "alpha-dsft"}, "stingning/ultrachat", "train", 207865),
    "ablations/beta-dsft": (SFT | {"stage": "beta-dsft"}, ULTRACHAT, "train_sft", None),
    "ablations/alpha-ddpo": (DPO | {"stage": "alpha-ddpo"}, ULTRAFEEDBACK, "train_prefs", None),
    "ablations/beta-ddpo": (DPO | {"stage": "beta-ddpo"}, ULTRAFEEDBACK, "train_prefs", None),
}
BASES = {
    "qwen3-4b": ("Qwen/Qwen3-4B-Base", 3e-4),
    "smollm3-3b": ("HuggingFaceTB/SmolLM3-3B-Base", 3e-4),
    "ministral-3-8b": ("mistralai/Ministral-3-8B-Base-2512", 2e-4),
    "gemma-3-4b": ("google/gemma-3-4b-pt", 3e-4),
    "phi-4-mini": ("microsoft/Phi-4-mini-instruct", 1e-4),
}
FAMILIES = {
    f"{name}/sft": (SFT | {"model_name_or_path": base, "learning_rate": rate}, ULTRACHAT, "train_sft", 10000)
    for name, (base, rate) in BASES.items()
} | {f"{name}/dpo": (DPO, ULTRAFEEDBACK, "train_prefs", 10000) for name in BASES}
ALL = FACTS | ABLATIONS | FAMILIES


def method(name: str):
    return "dpo" if "dpo" in name else "sft"


def test_these_are_all():
    assert set(preset_configs()) == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_the_facts_are_the_recipes(name):
    facts, path, split, limit = ALL[name]
    loaded = load_config(method(name), name)
    assert {key: getattr(loaded.config, key) for key in facts} == facts
    assert [(d.path, d.split, d.limit) for d in loaded.config.dataset] == [(path, split, limit)]
    if held_out := loaded.config.eval_dataset:  # an ablation's SFT stages leave that to the table
        assert (held_out[0].path, held_out[0].split) == (path, split.replace("train", "test"))
    else:
        assert name in ABLATIONS and method(name) == "sft"
    assert not loaded.notes


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_schemas_defaults_are_the_shipped_recipe(stage):
    """So that a file that leaves a key out means the recipe."""
    shipped = load_config(stage, f"zephyr-7b/{stage}").config
    default = RunConfig.model_validate(DPO_DEFAULTS if stage == "dpo" else {})
    differing = {k for k in RunConfig.model_fields if getattr(shipped, k) != getattr(default, k)}
    assert differing <= {"eval_dataset", "eval_steps", "save_steps"}


@pytest.mark.parametrize("name", FACTS)  # FAMILIES: tests/contract/test_more_families_folders.py
def test_it_runs_in_small(name, tmp_path, tiny_base, chat_rows, pair_rows):
    kind = method(name)
    rows = pair_rows if kind == "dpo" else chat_rows
    words = [
        f"model_name_or_path={tiny_base}",
        f"output_dir={tmp_path / 'run'}",
        f"dataset.path={rows}",
        f"eval_dataset.path={rows}",
        "max_steps=1",
        "lora_r=4",
        "samples=0",
        *(["adapters=none"] if kind == "dpo" else []),
    ]
    loaded = load_config(kind, name, words)
    outcome = (run_dpo if kind == "dpo" else run_sft)(loaded)
    assert outcome.step == 1
    assert StageDir(tmp_path / "run" / loaded.config.stage).complete()


@pytest.mark.parametrize("name", [n for n in ALL if method(n) == "dpo" and ALL[n][0].get("adapters") != "none"])
def test_stage_2_takes_base_and_storage_from_the_run_below(name):
    """So these files leave them out: a key that a file spells out would win over the run."""
    given = load_config("dpo", name).given
    assert not given & {"output_dir", *INHERITED}
