"""Rows of a user and configurations that several files train on."""

import json

import pytest

from tests.train.test_train import dpo_words, words
from zephyr_lite.config.load import load_config


@pytest.fixture
def loaded(tiny_base, chat_rows, tmp_path):
    """(the run's name, keys) → the configuration of an SFT stage."""
    return lambda name, **keys: load_config("sft", None, words(tiny_base, tmp_path / name, chat_rows, **keys))


@pytest.fixture
def dpo_loaded(tiny_base, pair_rows):
    """(the run's folder, keys) → the configuration of a DPO stage."""
    return lambda run, **keys: load_config("dpo", None, dpo_words(tiny_base, run, pair_rows, **keys))


@pytest.fixture
def own(tiny_base, tmp_path):
    """Words of a run on thirty rows of the user, without a configuration file."""
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"What is {n} plus one?", "completion": f"It is {n + 1}."} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"model_name_or_path={tiny_base}", f"dataset={path}", f"output_dir={tmp_path / 'run'}", "samples=0"]
