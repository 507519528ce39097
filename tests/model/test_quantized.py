"""The quantized base in the user's cache: equal to transformers' own quantization, made once, made again when the base changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Olmo2Config,
    Olmo2ForCausalLM,
)

from tests.conftest import make_model, make_tokenizer
from tests.messages import messages_to
from zephyr_lite.cli.environment import survey
from zephyr_lite.config.load import RunConfig
from zephyr_lite.data.batch import collate_conversations
from zephyr_lite.data.chat_template import Example
from zephyr_lite.model import base as load
from zephyr_lite.model.adapters import AdapterStack
from zephyr_lite.model.base import load_base
from zephyr_lite.model.decoder import Decoder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.delenv("ZEPHYR_LITE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zephyr-lite" / "quantized"


@pytest.fixture
def base(tmp_path) -> Path:
    return make_base(tmp_path / "base")


def make_base(folder: Path, kind: str = "mistral", *, sharded: bool = True, dtype=torch.bfloat16, **changes) -> Path:
    """A tiny base of several quantization blocks of scales, in 16 bits."""
    model = make_model(kind, **{"intermediate_size": 320, **changes}).to(dtype)
    model.save_pretrained(folder, max_shard_size="150KB" if sharded else "1GB")
    make_tokenizer(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1 or not sharded
    return folder


def config(base: Path, **changes) -> RunConfig:
    return RunConfig(model_name_or_path=str(base), **changes)


def entries(cache: Path) -> list[Path]:
    """Kept folders, what is beside them (but for locks) included."""
    return [path for path in cache.glob("*") if not path.name.startswith(".lock-")] if cache.is_dir() else []


def reference(base: Path, dtype: torch.dtype, double: bool):
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=settings, device_map={"": "cpu"}, use_safetensors=True
    )


def assert_same(model, wanted) -> None:
    """Every tensor, scales and their scales included, and every state's settings."""
    found, expected = model.state_dict(), wanted.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    for (name, p), (other, q) in zip(model.named_parameters(), wanted.named_parameters()):
        assert name == other and p.requires_grad is False
        if hasattr(q, "quant_state"):
            assert p.quant_state.as_dict(packed=True).keys() == q.quant_state.as_dict(packed=True).keys()
            assert (p.quant_state.dtype, p.quant_state.shape) == (q.quant_state.dtype, q.quant_state.shape)
            assert p.quant_state is model.get_submodule(name.removesuffix(".weight")).quant_state


@pytest.mark.parametrize(
    ("kind", "dtype", "double", "sharded", "tied"),
    [
        ("mistral", "float32", True, True, False),
        ("mistral", "bfloat16", False, False, True),
        ("llama", "float16", True, True, False),
    ],
)
def test_bits_are_those_of_from_pretrained(tmp_path, cache, kind, dtype, double, sharded, tied):
    folder = make_base(tmp_path / "base", kind, sharded=sharded, tie_word_embeddings=tied, attention_bias=True)
    wanted = reference(folder, getattr(torch, dtype), double)
    asked = config(folder, dtype=dtype, bnb_4bit_use_double_quant=double)
    for _ in range(2):
        found = load_base(asked)
        assert_same(found.model, wanted)
        assert (found.path, found.model.name_or_path, found.double_quant) == (folder, str(folder), double)
        assert found.model.config._name_or_path == str(folder) and not found.streamed
    assert (found.model.lm_head.weight is found.model.model.embed_tokens.weight) is tied
    kept = entries(cache)
    assert len(kept) == 1
    assert_same(
        AutoModelForCausalLM.from_pretrained(kept[0], dtype=getattr(torch, dtype)).requires_grad_(False), wanted
    )
    wanted.save_pretrained(tmp_path / "saved")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((kept[0] / name).read_text()) == json.loads((tmp_path / "saved" / name).read_text())


def test_a_streamed_base_stays_on_the_host(base, cache):
    """The device is only a name here: nothing is put on it, so a machine without it can tell."""
    streamed = load_base(config(base, dtype="bfloat16"), stream=True)
    (kept,) = entries(cache)
    make_tokenizer(kept)
    found = load_base(config(kept, dtype="bfloat16"), device=torch.device("cuda", 0), stream=True)
    assert found.streamed and found.device == torch.device("cuda", 0)
    for each in (streamed, found):
        assert {p.device.type for p in each.model.parameters()} == {"cpu"}
        assert_same(each.model, load_base(config(base, dtype="bfloat16"), device=CPU).model)


def test_plain_bases_and_quantized_ones_are_not_kept(base, cache):
    plain = load_base(config(base, load_in_4bit=False, dtype="bfloat16"), stream=True)
    assert not plain.load_in_4bit and not entries(cache)
    assert_same(plain.model, AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).requires_grad_(False))
    load_base(config(base, dtype="bfloat16"))
    (kept,) = entries(cache)
    make_tokenizer(kept)
    again = load_base(config(kept, dtype="float16"))  # another dtype than it was stored in
    assert again.path == kept and again.load_in_4bit and again.double_quant and entries(cache) == [kept]
    assert {p.dtype for p in again.model.parameters() if not hasattr(p, "quant_state")} == {torch.float16}
    batch = collate_conversations([Example(np.arange(9, dtype=np.int32), np.ones(9, dtype=bool), "", 0)])
    assert Decoder(AdapterStack(again.model), again.dtype).token_logps(batch).isfinite().all()


def test_a_family_that_may_rename_its_weights_is_quantized_in_memory(tmp_path, cache):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = Olmo2ForCausalLM(Olmo2Config(vocab_size=448, num_key_value_heads=2, **sizes))
    model.save_pretrained(tmp_path / "olmo2")
    make_tokenizer(tmp_path / "olmo2")
    found = load_base(config(tmp_path / "olmo2", engine="trl"))
    assert_same(found.model, reference(tmp_path / "olmo2", torch.float32, True))
    assert not entries(cache)


def test_where_the_cache_cannot_be_written_the_base_is_quantized_in_memory(base, cache, monkeypatch):
    def no_space(*words, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(load, "write_json", no_space)
    said: list[str] = []
    with messages_to(said.append):
        assert_same(load_base(config(base)).model, reference(base, torch.float32, True))
    assert entries(cache) == []
    assert "No space left" in said[-1] and "ZEPHYR_LITE_CACHE" in said[-1] and "in memory" in said[-1]


def inverted(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("model.safetensors", inverted), ("model.safetensors", Path.unlink), (load.MANIFEST, Path.unlink)],
)
def test_an_incomplete_or_damaged_folder_is_made_again(base, cache, name, damage):
    load_base(config(base))
    (kept,) = entries(cache)
    damage(kept / name)
    assert_same(load_base(config(base)).model, reference(base, torch.float32, True))
    assert entries(cache) == [kept] and (kept / name).is_file()


def test_a_base_that_was_changed_in_place_is_quantized_again(base, cache, monkeypatch):
    """The fingerprint reads samples of each tensor: a change between them shows in the file's date. A base that was only moved
    is not quantized again."""
    fingerprint = load.fingerprint(base)
    monkeypatch.setattr(load, "fingerprint", lambda folder: fingerprint)
    load_base(config(base))
    (kept,) = entries(cache)
    for path in base.glob("*.safetensors"):
        save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    said: list[str] = []
    with messages_to(said.append):
        assert_same(load_base(config(base)).model, reference(base, torch.float32, True))
    assert f"{kept}: damaged, or made of other files of the base" in said[0] and "quantizing the base once" in said[1]
    said.clear()
    with messages_to(said.append):
        load_base(config(base.rename(base.parent / "moved")))
    assert said == [] and entries(cache) == [kept]


def test_the_cache_has_a_variable_and_the_survey_names_it(base, tmp_path, cache, monkeypatch):
    assert load.quantized_dir() == cache
    monkeypatch.setenv("ZEPHYR_LITE_CACHE", str(tmp_path / "mine"))
    load_base(config(base))
    assert len(entries(tmp_path / "mine" / "quantized")) == 1 and entries(cache) == []
    (finding,) = [f for f in survey() if f.name == "quantized"]
    assert "of quantized bases" in finding.found and str(tmp_path / "mine") in finding.found


def test_what_it_depends_on_is_in_its_name(base, cache):
    load_base(config(base))
    load_base(config(base, dtype="bfloat16", bnb_4bit_use_double_quant=False))
    other = make_base(base.parent / "other" / "base", seed=1)
    load_base(config(other))
    assert len(entries(cache)) == 3
    (own,) = [path for path in entries(cache) if load.fingerprint(other)[:16] in path.name]
    assert own.name.startswith("base-")
