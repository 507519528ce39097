"""A base's identity: what is changed in its folder -> the same base, or another; and a base that was moved."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.contract.test_folders import base_folder, change_json
from tests.train.test_train import dpo_words, words
from zephyr_lite.config.load import load_config
from zephyr_lite.errors import UserError
from zephyr_lite.merge.command import run_merge
from zephyr_lite.model import files as fetch
from zephyr_lite.model.base_folder import fingerprint
from zephyr_lite.model.loaded import open_live
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft


@pytest.fixture
def base(tmp_path):
    return base_folder(tmp_path / "base")


def config(**keys):
    return lambda folder: change_json(folder / "config.json", **keys)


def consolidated(folder):
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")


def resharded(folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()


def keys_of_transformers_4(folder):
    told = json.loads((folder / "config.json").read_text())
    theta = told.pop("rope_parameters")["rope_theta"]
    told |= {
        "rope_theta": theta,
        "rope_scaling": None,
        "torch_dtype": told.pop("dtype"),
        "transformers_version": "4.37.0",
    }
    (folder / "config.json").write_text(json.dumps(told))


def other_metadata(folder):
    save_file(
        load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt", "note": "x"}
    )


def one_weight(name):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name][0, 0] += 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def halved(folder):
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (consolidated, True),
        (resharded, True),
        (keys_of_transformers_4, True),
        (other_metadata, True),
        (config(use_cache=False), True),
        (config(eos_token_id=[2, 3], pad_token_id=2, bos_token_id=0), True),
        (config(dtype=None, torch_dtype="float32"), True),
        (config(dtype="bfloat16"), True),
        (config(head_dim=None), True),
        (config(max_position_embeddings=4096, initializer_range=0.1, attention_dropout=0.1), True),
        (config(architectures=None, _name_or_path="x"), True),
        (config(rms_norm_eps=1e-3), False),
        (config(sliding_window=16), False),
        (config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), False),
        (config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), False),
        (one_weight("model.layers.0.mlp.up_proj.weight"), False),
        (one_weight("lm_head.weight"), False),
        (halved, False),
    ],
)
def test_what_makes_another_base(base, change, same):
    before = fingerprint(base)
    change(base)
    assert (fingerprint(base) == before) is same


def test_a_base_that_was_moved_is_given_with_base(base, chat_rows, pair_rows, tmp_path):
    run, settings = tmp_path / "run", {"load_in_4bit": "false", "max_steps": 2}
    run_sft(load_config("sft", None, words(base, run, chat_rows, **settings)))
    new = tmp_path / "elsewhere"
    base.rename(new)
    consolidated(new)
    config(use_cache=False, eos_token_id=[2, 3])(new)
    out = tmp_path / "m"
    for way in (lambda: open_live(run), lambda: run_merge(out, run=run, check=False)):
        with pytest.raises(UserError, match="there is no such folder") as caught:
            way()
        assert "--base FOLDER" in caught.value.hint
    live = open_live(run, base=str(new))
    run_merge(out, run=run, base=str(new), check=False)
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        off = live.stack.model(input_ids=ids).logits - AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits
    assert float(off.abs().max()) < 1e-4
    run_dpo(load_config("dpo", None, dpo_words(new, run, pair_rows, **settings)))
    other = base_folder(tmp_path / "other", seed=1)
    for way in (lambda: open_live(run, base=str(other)), lambda: run_merge(tmp_path / "n", run=run, base=str(other))):
        with pytest.raises(UserError, match="is not the model that"):
            way()


def test_mistrals_own_copy_of_the_weights_is_not_downloaded(monkeypatch, base):
    def download(name, **given):
        asked.update(given)
        return str(base)

    asked = {}
    monkeypatch.setattr(fetch, "snapshot_download", download)
    fetch.fetch_base("mistralai/Mistral-7B-v0.1")
    assert asked["ignore_patterns"] == ["consolidated*"]
