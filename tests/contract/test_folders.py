"""Model folders of other tools: the files read, and the files that merge and export write."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import make_model, make_tokenizer
from tests.contract.test_gguf import off, read_back
from zephyr_lite.config.load import RunConfig
from zephyr_lite.data.chat_template import resolve_template
from zephyr_lite.errors import UserError
from zephyr_lite.export.gguf import write_gguf
from zephyr_lite.merge import merge
from zephyr_lite.merge.command import run_merge
from zephyr_lite.model.base import load_base
from zephyr_lite.model.loaded import open_live
from zephyr_lite.model.peft_io import LoraWeights, write_adapter
from zephyr_lite.model.tokenizer import load_tokenizer, save_tokenizer


def base_folder(folder, **config):
    make_model(**config).save_pretrained(folder)
    tokenizer = make_tokenizer(folder)
    resolve_template("zephyr", tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def change_json(path, **keys):
    told = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in told.items() if keys.get(key, 0) is not None}))


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


def with_pad(folder, template="zephyr", **special):
    """The small tokenizer with special tokens behind its vocabulary, as other tools add them without an embedding."""
    tokenizer = make_tokenizer(folder)
    tokenizer.add_special_tokens(special)
    if template:
        resolve_template(template, tokenizer)
    tokenizer.save_pretrained(folder)
    return tokenizer


def saved_adapter(folder, base):
    module = LoraWeights(torch.ones(2, 64) * 0.01, torch.ones(128, 2), 1.0)
    write_adapter(folder, {"model.layers.0.mlp.up_proj": module}, base_model_name=str(base))
    return folder


TEXT = "Hello [PAD] there"


def test_an_unused_pad_token_without_an_embedding_blocks_nothing(tmp_path):
    base = base_folder(tmp_path / "base", vocab_size=420)
    plain = load_tokenizer(base)(TEXT)["input_ids"]
    with_pad(saved_adapter(tmp_path / "a", base), pad_token="[PAD]")
    assert max(load_tokenizer(tmp_path / "a")(TEXT)["input_ids"]) == 420
    live = open_live(adapters=[str(tmp_path / "a")], base=str(base))
    assert live.template.tokenizer(TEXT)["input_ids"] == plain
    run_merge(tmp_path / "m", adapters=[str(tmp_path / "a")], base=str(base), check=False)
    merged = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert merged(TEXT)["input_ids"] == plain and len(merged) == 420
    assert merged.chat_template == live.template.text
    with_pad(base, pad_token="[PAD]")
    assert load_base(RunConfig(model_name_or_path=str(base))).tokenizer(TEXT)["input_ids"] == plain


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused_before_anything_is_written(tmp_path):
    base = base_folder(tmp_path / "base", vocab_size=420)
    with_pad(saved_adapter(tmp_path / "a", base), "chatml", extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    given = {"adapters": [str(tmp_path / "a")], "base": str(base)}
    for way in (lambda: open_live(**given), lambda: run_merge(tmp_path / "m", **given)):
        with pytest.raises(UserError, match=rf"^{tmp_path}/a: the tokenizer adds <\|im_start\|> \(id 420\)"):
            way()
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("base", "a")] == []


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}])
def test_a_merged_folder_has_the_keys_of_transformers_4_and_5(tmp_path, rope):
    base = base_folder(tmp_path / "base", **({"rope_parameters": rope} if rope else {}))
    wanted = AutoModelForCausalLM.from_pretrained(base)
    zero = LoraWeights(torch.zeros(2, 64), torch.zeros(128, 2), 1.0)
    merge(base, [{"model.layers.0.mlp.up_proj": zero}], tmp_path / "m")
    told = json.loads((tmp_path / "m/config.json").read_text())
    assert told["dtype"] == told["torch_dtype"] == "float32"
    assert told["rope_theta"] == (rope or {}).get("rope_theta", 10000.0)
    assert told.get("rope_scaling") == ({"rope_type": "linear", "factor": 2.0} if rope else None)
    assert off(wanted, AutoModelForCausalLM.from_pretrained(tmp_path / "m")) == 0


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "PreTrainedTokenizerFast"),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "extra": 1}, "PreTrainedTokenizerFast"),
        ({"chat_template": "{{ 'inline' }}"}, "PreTrainedTokenizerFast"),
    ],
    ids=["written by 5", "written by 4", "with a template inside"],
)
def test_a_tokenizer_that_did_not_change_keeps_its_files(tmp_path, change, name):
    make_tokenizer(tmp_path)
    change_json(tmp_path / "tokenizer_config.json", **change)
    tokenizer = load_tokenizer(tmp_path)
    text = resolve_template("zephyr", tokenizer).text
    (tmp_path / "out").mkdir()
    save_tokenizer(tokenizer, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    told = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == name and told.get("extra") == change.get("extra")
    assert load_tokenizer(tmp_path / "out").chat_template == text


def test_a_changed_tokenizer_is_written_with_a_class_that_both_majors_know(tmp_path):
    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    (tmp_path / "out").mkdir()
    save_tokenizer(tokenizer, tmp_path / "out")
    told = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert told["additional_special_tokens"] == ["<|im_end|>"] and "extra_special_tokens" not in told
    again = load_tokenizer(tmp_path / "out")
    assert again("a<|im_end|>")["input_ids"] == tokenizer("a<|im_end|>")["input_ids"]
