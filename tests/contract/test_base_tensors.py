"""Weights against config.json: a tensor that the model has no place for, and a layer that it does not have, are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from tests.conftest import make_tokenizer
from zephyr_lite.cli import app as cli
from zephyr_lite.config.load import RunConfig
from zephyr_lite.errors import UserError
from zephyr_lite.model.base import load_base


@pytest.fixture
def base(tiny_base, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def add(base: Path, *names: str) -> None:
    weights = load_file(base / "model.safetensors")
    save_file(weights | {name: torch.ones(3) for name in names}, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.up_proj.lora_A.weight",
        "score.weight",
        "model.extra.weight.x",
    ],
)
def test_a_tensor_that_nothing_reads_is_refused(base, name, four_bit, monkeypatch):
    add(base, name)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("transformers saw it"))
    with pytest.raises(UserError, match=f"holds tensor {name}, for which the model of config.json has no place"):
        load_base(RunConfig(model_name_or_path=str(base), load_in_4bit=four_bit))


def test_frequencies_that_old_checkpoints_hold_are_not_missed(base):
    add(base, "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq")
    load_base(RunConfig(model_name_or_path=str(base), load_in_4bit=False))


def test_fewer_layers_in_the_configuration_than_in_the_weights(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"config\.json says 1 layers, the weights have 2"):
        load_base(RunConfig(model_name_or_path=str(base)))


def test_of_a_family_that_only_trl_knows(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=448, num_key_value_heads=2, **sizes))
    model.save_pretrained(tmp_path / "gemma2")
    make_tokenizer(tmp_path / "gemma2")
    asked = RunConfig(model_name_or_path=str(tmp_path / "gemma2"), engine="trl", load_in_4bit=False)
    load_base(asked)
    config = json.loads((tmp_path / "gemma2" / "config.json").read_text())
    fewer = {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]}
    (tmp_path / "gemma2" / "config.json").write_text(json.dumps({**config, **fewer}))
    with pytest.raises(UserError, match=r"holds tensor model\.layers\.1\..* and \d+ more, for which the model"):
        load_base(asked)


@pytest.mark.parametrize(("context", "said"), [(16, True), (1024, False)])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_rows_longer_than_the_base_was_made_for_are_said(base, chat_rows, pair_rows, capsys, method, context, said):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
    rows = chat_rows if method == "sft" else pair_rows
    own = ["max_length=128", *(["adapters=none", "max_prompt_length=64"] if method == "dpo" else [])]
    code = cli.run(
        [method, f"model_name_or_path={base}", f"dataset={rows}", *own, "lora_r=4", "samples=0", "--dry-run"]
    )
    out = capsys.readouterr().out
    assert code == 0 and (f"rows are longer than the {context} tokens that the base was made for" in out) is said, out
