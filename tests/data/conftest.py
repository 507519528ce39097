"""A cache of data sets for each test, and Mistral's tokenizer."""

import importlib.util
import json
import shutil
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def mistral_folder(tmp_path_factory) -> Path:
    spec = importlib.util.find_spec("mistral_common")
    if spec is None:
        pytest.skip("mistral-common is not installed; pip install zephyr-lite[dev]")
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    return folder


@pytest.fixture
def mistral(mistral_folder):
    return AutoTokenizer.from_pretrained(mistral_folder)
