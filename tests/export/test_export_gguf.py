"""GGUF files: what transformers and llama.cpp read back is the model, its ids and its chat template."""

import json
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex

from tests.contract.test_gguf import fields, model_dir
from zephyr_lite.errors import UserError
from zephyr_lite.export import llama
from zephyr_lite.export.gguf import write_gguf
from zephyr_lite.export.gguf_vocab import _LLAMA3
from zephyr_lite.export.llama import write_q4_k_m


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    return model_dir(tmp_path_factory.mktemp("models") / "small", num_hidden_layers=2)


def test_the_file_says_what_servers_ask_for(mistral, tmp_path):
    told = fields(write_gguf(mistral, tmp_path / "m.gguf").out)
    assert told["general.architecture"] == "llama" and told["general.name"] == "small"
    assert told["tokenizer.ggml.add_bos_token"] is False  # the template writes it
    assert (told["tokenizer.ggml.bos_token_id"], told["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert told["llama.context_length"] == 1024 and told["llama.attention.head_count_kv"] == 2
    assert told["llama.rope.dimension_count"] == 16 and told["tokenizer.ggml.pre"] == "gpt-2"
    assert len(told["tokenizer.ggml.tokens"]) == told["llama.vocab_size"] == 448
    types = told["tokenizer.ggml.token_type"]
    assert types[:3] == [3, 3, 3] and types[-1] == 5  # control; rows of the embedding without a token


def test_pre_tokenizers_are_known_by_what_they_do(mistral, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(mistral, folder)
    path = folder / "tokenizer.json"
    plain = json.loads(path.read_text())
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False}
    digits = {"type": "Digits", "individual_digits": True}
    for name, steps, ignore in (
        ("smollm", [digits, plain["pre_tokenizer"]], False),
        ("llama-bpe", [split, bytes_only], True),
        ("dbrx", [split, bytes_only], False),  # llama.cpp takes whole words by the name above
        ("dbrx", [{**split, "behavior": "Removed", "invert": True}, bytes_only], False),
        (None, [{**split, "behavior": "Removed"}, bytes_only], False),
        (None, [{**digits, "individual_digits": False}, plain["pre_tokenizer"]], False),
        (None, [{**split, "pattern": {"Regex": r"\d+"}}, bytes_only], True),
    ):
        Regex(split["pattern"]["Regex"])  # is one that the library compiles
        told = json.loads(json.dumps(plain))
        told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        told["model"]["ignore_merges"] = ignore
        path.write_text(json.dumps(told))
        if name is None:
            with pytest.raises(UserError, match="other ids than training saw"):
                write_gguf(folder, tmp_path / "m.gguf")
        else:
            assert fields(write_gguf(folder, tmp_path / "m.gguf").out)["tokenizer.ggml.pre"] == name


def test_what_cannot_be_exported_is_said_and_nothing_is_left(mistral, tmp_path, monkeypatch):
    out = tmp_path / "out" / "m.gguf"

    def refused(folder, match):
        with pytest.raises(UserError, match=match) as error:
            write_gguf(folder, out)
        assert not out.parent.exists() or not list(out.parent.iterdir())
        return error.value.hint

    assert "merge --run" in refused(tmp_path / "nowhere", "holds no model")

    (mine := tmp_path / "notes.txt").write_text("my notes")
    with pytest.raises(UserError, match="is there already, and no GGUF file"):
        write_gguf(mistral, mine)
    assert mine.read_text() == "my notes"

    folder = tmp_path / "m"
    shutil.copytree(mistral, folder)
    weights = load_file(folder / "model.safetensors")
    huge = {**weights, "lm_head.weight": weights["lm_head.weight"] * 1e7}
    save_file(huge, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "lm_head.weight: holds .* float16 reaches 65504")
    less = {name: w for name, w in weights.items() if "layers.1.mlp.up" not in name}
    save_file(less, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "no tensor model.layers.1.mlp.up_proj.weight")
    save_file({**weights, "strange.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "strange.weight")
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    refused(folder, "stored quantized")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refused(mistral, "optional package: import of gguf") == 'pip install "zephyr-lite[export]"'


def test_q4_k_m_is_made_by_llama_cpp(mistral, tmp_path, monkeypatch):
    program, out = tmp_path / "llama-quantize", tmp_path / "m.gguf"
    with monkeypatch.context() as patched:
        patched.setattr(llama, "find_spec", lambda name: None)
        patched.setattr(llama.shutil, "which", lambda name: None)
        with pytest.raises(UserError, match="own quantizer, and there is no program") as error:
            write_q4_k_m(mistral, out)
        assert "pip install llama-cpp-python" in error.value.hint and list(tmp_path.iterdir()) == []

    copies = f'#!{sys.executable}\nimport shutil, sys\nassert sys.argv[3] == "Q4_K_M"\nshutil.copy(*sys.argv[1:3])\n'
    for script, found in (
        (copies, None),
        ("#!/bin/sh\necho its own words >&2\nexit 3\n", r"exit code 3\): its own words"),
        ("#!/bin/sh\n", "no output"),
    ):
        program.write_text(script)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        if found is None:
            report = write_q4_k_m(mistral, out, llama_quantize=program)
            assert report.types == {"F16": 16, "F32": 5} and "16 tensors are no multiple of 256" in report.notes[-1]
        else:
            with pytest.raises(UserError, match=found):
                write_q4_k_m(mistral, out, llama_quantize=program)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-quantize", "m.gguf"]  # not the one in F16
