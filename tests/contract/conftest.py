"""Runs that several files of the contract start from: an SFT stage in float32 on a windowed base, and one in 4 bits."""

import shutil

import pytest

from tests.conftest import make_model, make_tokenizer
from tests.train.test_train import words
from zephyr_lite.config.load import load_config
from zephyr_lite.train.sft import run_sft


@pytest.fixture(scope="session")
def windowed(tmp_path_factory):
    """A base whose sliding window is smaller than any of the rows."""
    folder = tmp_path_factory.mktemp("windowed")
    make_model(sliding_window=9).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """For TRL's trainers, with a token for padding."""
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.pad_token = "<unk>"
    return tokenizer


@pytest.fixture(scope="session")
def sft_run(windowed, chat_rows, tmp_path_factory):
    """A run whose SFT stage is complete, the base in float32, so that a merge rounds nothing."""
    out = tmp_path_factory.mktemp("runs") / "a"
    run_sft(load_config("sft", None, words(windowed, out, chat_rows, batch_size=1, load_in_4bit="false")))
    return out


@pytest.fixture
def run(sft_run, tmp_path):
    """A copy of it, to train the next stage in."""
    shutil.copytree(sft_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def quantized_sft_run(tiny_base, chat_rows, tmp_path_factory):
    """A run whose SFT stage is complete, the base in 4 bits, with dropout."""
    out = tmp_path_factory.mktemp("runs") / "a"
    run_sft(load_config("sft", None, words(tiny_base, out, chat_rows, batch_size=1, lora_dropout=0.1)))
    return out


@pytest.fixture
def quantized_run(quantized_sft_run, tmp_path):
    """A copy of it, to train the next stage in."""
    shutil.copytree(quantized_sft_run, tmp_path / "run")
    return tmp_path / "run"
