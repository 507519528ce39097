"""The quantized base in the user's cache: the same bits as transformers' own, kept once, whatever goes wrong meanwhile."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.conftest import make_model, make_tokenizer
from zephyr_lite.cli.environment import survey
from zephyr_lite.config.load import RunConfig
from zephyr_lite.data.batch import collate_conversations
from zephyr_lite.data.chat_template import Example
from zephyr_lite.errors import UserError
from zephyr_lite.io.safetensors import SafetensorsFile
from zephyr_lite.model import base as load
from zephyr_lite.model import quantized, quantized_files
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


def loaded_right(folder: Path, say=print) -> None:
    found = load_base(config(folder), say=say).model
    assert_same(found, reference(folder, torch.float32, True))


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
        ("llama", "float32", False, True, True),
        ("llama", "bfloat16", True, False, False),
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


def test_small_files_hold_the_same_bits(base, cache, monkeypatch):
    monkeypatch.setattr(quantized_files, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(quantized_files, "CAST_BYTES", 1_000)
    monkeypatch.setattr("zephyr_lite.ops.nf4._PIECE", 1024)
    assert_same(load_base(config(base)).model, reference(base, torch.float32, True))
    (kept,) = entries(cache)
    index = json.loads((kept / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and files == {path.name for path in kept.glob("*.safetensors")}
    assert all(index["weight_map"][name] == file for file in files for name in load_file(kept / file))


def test_what_it_depends_on_is_in_its_name(base, cache):
    load_base(config(base))
    load_base(config(base, dtype="bfloat16"))
    load_base(config(base, bnb_4bit_use_double_quant=False))
    assert len(entries(cache)) == 3
    other = make_base(base.parent / "other" / "base", seed=1)
    load_base(config(other))
    assert len(entries(cache)) == 4
    (own,) = [path for path in entries(cache) if load.fingerprint(other)[:16] in path.name]
    assert own.name.startswith("base-")


def test_a_second_start_reads_no_16_bit_weights(base, cache, monkeypatch):
    first = load_base(config(base))
    for path in base.glob("*.safetensors"):  # nothing but the files' headers, sizes and dates is as it was
        told, start = path.stat(), SafetensorsFile(path).data_start
        path.write_bytes(path.read_bytes()[:start] + bytes(told.st_size - start))
        os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))
    monkeypatch.setattr(load, "fingerprint", lambda folder: first.fingerprint)
    said: list[str] = []
    second = load_base(config(base), say=said.append)
    assert_same(second.model, first.model)
    assert said == [] and second.path == base and second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert not any(any(path.read_bytes()[SafetensorsFile(path).data_start :]) for path in base.glob("*.safetensors"))


@pytest.mark.parametrize("kept", [True, False])
def test_a_streamed_base_lies_on_the_host(base, cache, monkeypatch, kept):
    if not kept:
        monkeypatch.setattr(quantized, "write_quantized", no_space)
    found = load_base(config(base), stream=True)
    assert found.streamed and found.device.type == load.compute_device().type
    assert {p.device.type for p in found.model.parameters()} == {"cpu"}
    assert_same(found.model, load_base(config(base), device=CPU).model)


def test_a_streamed_base_computes_on_another_device_than_it_lies_on(base, cache):
    """The device is only a name here: nothing is put on it, so a machine without it can tell."""
    load_base(config(base, dtype="bfloat16"))
    (kept,) = entries(cache)
    make_tokenizer(kept)
    found = load_base(config(kept, dtype="bfloat16"), device=torch.device("cuda", 0), stream=True)
    assert found.device == torch.device("cuda", 0) and found.dtype == torch.bfloat16
    assert {p.device.type for p in found.model.parameters()} == {"cpu"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_nothing_stays_mapped_once_the_projections_are_copied(base, cache):
    for _ in range(2):
        found = load_base(config(base), stream=True)
    for module in found.model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            module.weight.data, state.absmax = module.weight.data.clone(), state.absmax.clone()
    gc.collect()  # the model before
    mapped = Path("/proc/self/maps").read_text()
    assert str(cache) not in mapped and str(base) not in mapped
    assert found.model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_plain_bases_and_quantized_ones_are_not_kept(base, cache):
    plain = load_base(config(base, load_in_4bit=False, dtype="bfloat16"), stream=True)
    assert not plain.load_in_4bit and not entries(cache)
    wanted = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).requires_grad_(False)
    assert_same(plain.model, wanted)
    load_base(config(base))
    (kept,) = entries(cache)
    make_tokenizer(kept)
    again = load_base(config(kept))
    assert again.path == kept and again.load_in_4bit and again.double_quant and entries(cache) == [kept]


def test_a_quantized_checkpoint_computes_in_another_dtype_than_it_was_stored_in(base, cache):
    load_base(config(base, dtype="bfloat16"))
    (kept,) = entries(cache)
    make_tokenizer(kept)
    for dtype in (torch.float32, torch.float16):
        found = load_base(config(kept, dtype=str(dtype).removeprefix("torch.")))
        plain = [p for p in found.model.parameters() if not hasattr(p, "quant_state")]
        assert found.dtype == dtype and {p.dtype for p in plain} == {dtype} and len(plain) == 7
        stack = AdapterStack(found.model)
        batch = collate_conversations([Example(np.arange(9, dtype=np.int32), np.ones(9, dtype=bool), "", 0)])
        assert Decoder(stack, found.dtype).token_logps(batch).isfinite().all()


def test_a_family_that_may_rename_its_weights_is_quantized_in_memory(tmp_path, cache):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=448, num_key_value_heads=2, **sizes))
    model.save_pretrained(tmp_path / "qwen")
    make_tokenizer(tmp_path / "qwen")
    found = load_base(config(tmp_path / "qwen", engine="trl"))
    assert_same(found.model, reference(tmp_path / "qwen", torch.float32, True))
    assert not entries(cache)


def test_files_that_name_their_tensors_otherwise_are_left_to_transformers(tmp_path, cache):
    folder = make_base(tmp_path / "base", sharded=False)
    tensors = {name.removeprefix("model."): t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said: list[str] = []
    found = load_base(config(folder), say=said.append)
    assert_same(found.model, reference(folder, torch.float32, True))
    assert "no tensor model.embed_tokens.weight" in said[0] and not entries(cache)


# What goes wrong


def no_space(*words, **settings):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")


@pytest.mark.parametrize("where", ["write_stream", "write_json"])
def test_a_full_disk_is_said_and_the_base_quantized_in_memory(base, cache, monkeypatch, where):
    monkeypatch.setattr(quantized_files if where == "write_stream" else quantized, where, no_space)
    said: list[str] = []
    found = load_base(config(base), say=said.append)
    assert_same(found.model, reference(base, torch.float32, True))
    assert entries(cache) == []
    assert "No space left" in said[-1] and "ZEPHYR_LITE_CACHE" in said[-1] and "in memory" in said[-1]
    monkeypatch.undo()


def test_too_little_room_is_known_before(base, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    monkeypatch.setattr(quantized, "write_quantized", no_space)
    said: list[str] = []
    load_base(config(base), say=said.append)
    assert "0.00 GB free" in said[0] and "0.07 GB" in said[0] and "ZEPHYR_LITE_CACHE" in said[0] and len(said) == 1


def test_a_cache_that_cannot_be_written(base, cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    said: list[str] = []
    found = load_base(config(base), say=said.append)
    assert_same(found.model, reference(base, torch.float32, True))
    assert "cannot be kept" in said[0] and str(cache) in said[0]


def test_a_broken_base_is_the_users_error_and_leaves_nothing(base, cache):
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=shard.name):
        load_base(config(base))
    assert entries(cache) == []


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def inverted_byte(place: int):
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place] ^= 0xFF
        path.write_bytes(data)

    return damage


def sizes_for_hashes(path: Path) -> None:
    """The manifest of earlier versions, which had sizes only."""
    told = json.loads(path.read_text())
    path.write_text(
        json.dumps({**told, "files": {name: path.with_name(name).stat().st_size for name in told["files"]}})
    )


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("model.safetensors", shorter, "model.safetensors has another hash"),
        ("model.safetensors", inverted_byte(12), "model.safetensors has another hash"),
        ("model.safetensors", inverted_byte(-1), "model.safetensors has another hash"),
        ("model.safetensors", Path.unlink, "cannot be read"),
        ("config.json", lambda path: path.write_text("x" * path.stat().st_size), "config.json has another hash"),
        (quantized.MANIFEST, Path.unlink, "cannot be read"),
        (quantized.MANIFEST, lambda path: path.write_text("[]"), "not readable"),
        (quantized.MANIFEST, lambda path: path.write_text('{"files": {}, "format": 0}'), "another base or version"),
        (quantized.MANIFEST, lambda path: path.write_text(path.read_text().replace("sha256", "md5")), "or version"),
        (quantized.MANIFEST, sizes_for_hashes, "another hash"),
        (quantized.MANIFEST, lambda path: path.write_text(path.read_text().replace('"seen"', '"files"')), "or version"),
    ],
)
def test_a_damaged_folder_is_made_again(base, cache, file, damage, says):
    load_base(config(base))
    (kept,) = entries(cache)
    damage(kept / file)
    said: list[str] = []
    found = load_base(config(base), say=said.append)
    assert says in said[0] and "made again" in said[0] and str(kept) in said[0]
    assert_same(found.model, reference(base, torch.float32, True))
    assert entries(cache) == [kept] and quantized.fault(kept, recipe(base)) is None
    said.clear()
    load_base(config(base), say=said.append)
    assert said == []


def recipe(base: Path) -> quantized.Recipe:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    return quantized.Recipe(str(base), load.fingerprint(base), settings, torch.float32)


def test_the_survey_names_the_cache(base, cache):
    assert any(f.name == "quantized" and "none yet" in f.found for f in survey())
    load_base(config(base))
    (finding,) = [f for f in survey() if f.name == "quantized"]
    assert "1 base" in finding.found and str(cache) in finding.found


# Names, links, permissions


@pytest.mark.parametrize("name", [".llama.v1", "y" * 240, "é" * 120, "a b'c\"[0-9]*?", "..."])
def test_any_name_of_a_base_will_do(tmp_path, cache, name):
    folder = make_base(tmp_path / name, sharded=False)
    load_base(config(folder))
    (kept,) = entries(cache)
    assert not kept.name.startswith(".") and len(kept.name.encode()) < 160
    load_base(config(make_base(tmp_path / "next", seed=1)))  # it sweeps
    said: list[str] = []
    loaded_right(folder, said.append)
    assert said == [] and kept in entries(cache)


def test_the_sweep_leaves_what_is_not_its_own(base, cache):
    others = cache / ".llama.v1-0123456789abcdef-nf4-double-float32-v1"
    left = cache / ".llama-0123456789abcdef-nf4-double-float32-v1.x7_a1b2c"
    for folder in (others, left):
        folder.mkdir(parents=True)
    load_base(config(base))
    assert others.is_dir() and not left.exists()


def behind_a_link(kept: Path) -> None:
    away = kept.rename(kept.parents[3] / "away")
    shorter(away / "model.safetensors")
    kept.symlink_to(away)


def a_file(kept: Path) -> None:
    shutil.rmtree(kept)
    kept.write_text("a file")


def a_dangling_link(kept: Path) -> None:
    shutil.rmtree(kept)
    kept.symlink_to("nowhere")


@pytest.mark.parametrize("damage", [behind_a_link, a_file, a_dangling_link])
def test_what_is_in_a_folders_place_is_replaced(base, cache, damage):
    load_base(config(base))
    (kept,) = entries(cache)
    damage(kept)
    said: list[str] = []
    loaded_right(base, said.append)
    assert "made again" in said[0] and "later starts read" in said[1]
    assert entries(cache) == [kept] and kept.is_dir() and not kept.is_symlink()
    said.clear()
    loaded_right(base, said.append)
    assert said == []


@pytest.mark.parametrize("method", ["glob", "mkdir"])
def test_a_cache_that_may_not_be_entered(base, cache, monkeypatch, method):
    """Permissions do not bind root, so the refusal is put in."""
    asked = getattr(Path, method)

    def refused(self, *words, **options):
        if self == cache or cache in self.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return asked(self, *words, **options)

    monkeypatch.setattr(Path, method, refused)
    said: list[str] = []
    loaded_right(base, said.append)
    assert "Permission denied" in said[-1] and "ZEPHYR_LITE_CACHE" in said[-1] and "in memory" in said[-1]


def test_the_cache_has_a_variable_of_its_own(base, tmp_path, cache, monkeypatch):
    assert quantized.quantized_dir() == cache
    monkeypatch.setenv("ZEPHYR_LITE_CACHE", str(tmp_path / "mine"))
    load_base(config(base))
    assert len(entries(tmp_path / "mine" / "quantized")) == 1 and entries(cache) == []
    monkeypatch.delenv("ZEPHYR_LITE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert quantized.quantized_dir() == Path.home() / ".cache" / "zephyr-lite" / "quantized"


def test_a_link_that_leads_nowhere_is_the_users_error(base, cache):
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.unlink()
    shard.symlink_to("../blobs/none")
    with pytest.raises(UserError, match=f"{shard.name} is missing(.|\n)*[Ff]etch the model again"):
        load_base(config(base))
