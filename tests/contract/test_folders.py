"""Folders of models: what lies in one -> what is read, and what merge and export write."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import make_model, make_tokenizer
from tests.test_export_gguf import off, read_back
from zephyr_lite.data.chat import resolve_template
from zephyr_lite.export.gguf_file import write_gguf
from zephyr_lite.merge import merge
from zephyr_lite.model.peft_files import LoraWeights


def base_folder(folder, **config):
    make_model(**config).save_pretrained(folder)
    tokenizer = make_tokenizer(folder)
    resolve_template("zephyr", tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def change_json(path, **keys):
    told = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))


@pytest.mark.parametrize(
    ("flag", "head", "tied"),
    [
        (True, "absent", True),
        (True, "equal", True),
        (True, "other", False),
        (False, "equal", False),
        (False, "other", False),
    ],
)
def test_a_head_of_its_own_is_believed_over_the_flag(tmp_path, flag, head, tied):
    base = base_folder(tmp_path / "base")
    change_json(base / "config.json", tie_word_embeddings=flag)
    tensors = load_file(base / "model.safetensors")
    if head == "absent":
        del tensors["lm_head.weight"]
    elif head == "equal":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    wanted = AutoModelForCausalLM.from_pretrained(base)
    module = LoraWeights(torch.zeros(2, 64), torch.zeros(128, 2), 1.0)
    merge(base, [{"model.layers.0.mlp.up_proj": module}], tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is tied
    assert off(wanted, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) == 0
    for folder in (base, tmp_path / "merged"):
        write_gguf(folder, tmp_path / "m.gguf")
        model, _ = read_back(tmp_path / "m.gguf")
        assert off(wanted, model) < 1e-3
