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
)

from tests.conftest import make_model, make_tokenizer
from tests.messages import messages_to
from zephyr_lite.config.load import RunConfig
from zephyr_lite.data.batch import collate_conversations
from zephyr_lite.data.chat_template import Example
from zephyr_lite.model import base as load
from zephyr_lite.model.adapters import AdapterStack
from zephyr_lite.model.base import load_base
from zephyr_lite.model.decoder import Decoder


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
        assert found.model.config._name_or_path == str(folder)
    assert (found.model.lm_head.weight is found.model.model.embed_tokens.weight) is tied
    kept = entries(cache)
    assert len(kept) == 1
    assert_same(
        AutoModelForCausalLM.from_pretrained(kept[0], dtype=getattr(torch, dtype)).requires_grad_(False), wanted
    )
    wanted.save_pretrained(tmp_path / "saved")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((kept[0] / name).read_text()) == json.loads((tmp_path / "saved" / name).read_text())


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


def inverted(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("model.safetensors", inverted), (load.MANIFEST, Path.unlink)],
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
