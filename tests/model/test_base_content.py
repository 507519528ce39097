"""A base that changes under its name, and copies of one: what is kept is used for what it was made of, and for equals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.model.test_quantized import (
    assert_same,
    config,
    entries,
    loaded_right,
    make_base,
    no_space,
    recipe,
    reference,
)
from zephyr_lite.io.safetensors import SafetensorsFile, tensor_bytes
from zephyr_lite.model import base as load
from zephyr_lite.model import quantized
from zephyr_lite.model.base import load_base


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("ZEPHYR_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


@pytest.fixture
def base(tmp_path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def sampled_elsewhere(monkeypatch) -> None:
    """The fingerprint's samples cover all of a base as small as these: let it see sizes only, as it sees a layer of a
    large one."""

    def sizes(folder: Path) -> str:
        told = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
        return hashlib.sha256(repr(told).encode()).hexdigest()

    monkeypatch.setattr(load, "fingerprint", sizes)


def scale(folder: Path, factor: float, name: str = "model.layers.1.self_attn.v_proj.weight") -> None:
    """Change a tensor in place."""
    for path in sorted(folder.glob("*.safetensors")):
        file = SafetensorsFile(path)
        if name in file.entries:
            entry = file.entries[name]
            with path.open("r+b") as out:
                out.seek(entry.start)
                out.write(tensor_bytes(file.tensor(name) * factor))


@pytest.mark.parametrize("linked", [False, True])
def test_a_base_that_was_changed_in_place_is_quantized_again(base, cache, sampled_elsewhere, linked):
    folder = base
    if linked:  # as in the hub's cache
        folder = base.parent / "snapshots" / "1"
        folder.mkdir(parents=True)
        base = base.rename(base.parent / "blobs")
        for path in base.iterdir():
            (folder / path.name).symlink_to(Path("..", "..", base.name, path.name))
    before = load_base(config(folder))
    (kept,) = entries(cache)
    scale(base, 1.5)
    said: list[str] = []
    loaded_right(folder, said.append)
    assert load_base(config(folder)).fingerprint == before.fingerprint
    assert any("the base has changed since; the quantized base is made again" in line for line in said), said
    assert entries(cache) == [kept] and quantized.fault(kept, recipe(folder)) is None
    said.clear()
    loaded_right(folder, said.append)
    assert said == []


def test_a_base_that_was_touched_is_compared_once(base, cache, monkeypatch):
    load_base(config(base))
    for path in base.glob("*.safetensors"):
        os.utime(path, ns=(10**18, 10**18))
    monkeypatch.setattr(quantized, "write_quantized", no_space)
    said: list[str] = []
    loaded_right(base, said.append)
    loaded_right(base, said.append)
    assert len(said) == 1 and "comparing their contents" in said[0]


def test_two_bases_of_one_fingerprint_are_both_kept(base, cache, sampled_elsewhere):
    other = shutil.copytree(base, base.parent / "other")
    scale(other, 2.0)
    assert load.fingerprint(base) == load.fingerprint(other)
    for folder in (base, other):
        loaded_right(folder)
    said: list[str] = []
    for folder in (base, other):
        loaded_right(folder, said.append)
    assert len(entries(cache)) == 2 and said == []


def test_a_cache_of_others_serves_a_copy_without_being_written(base, cache, monkeypatch):
    load_base(config(base))
    copy = shutil.copytree(base, base.parent / "copy")
    monkeypatch.setattr(quantized, "write_json", no_space)
    said: list[str] = []
    loaded_right(copy, said.append)
    assert len(said) == 1 and "comparing" in said[0]


def test_a_base_that_changes_while_it_is_read_is_not_kept(base, cache, monkeypatch):
    plan = quantized.tensors_to_keep

    def changing(*words):
        scale(base, 1.5)
        return plan(*words)

    monkeypatch.setattr(quantized, "tensors_to_keep", changing)
    said: list[str] = []
    loaded_right(base, said.append)
    assert "changed while they were read" in said[-1] and entries(cache) == []


def test_the_configuration_is_the_bases_own(base, cache):
    load_base(config(base))
    (kept,) = entries(cache)
    text = (kept / "config.json").read_text()
    told = json.loads(text)
    (kept / "config.json").write_text(text.replace(f'"rms_norm_eps": {told["rms_norm_eps"]}', '"rms_norm_eps": 1e-01'))
    assert json.loads((kept / "config.json").read_text())["rms_norm_eps"] == 0.1
    found = load_base(config(base)).model
    assert found.config.rms_norm_eps == told["rms_norm_eps"] == found.model.norm.variance_epsilon
    assert_same(found, reference(base, torch.float32, True))


def test_a_copy_is_compared_once_and_shares_what_is_kept(base, cache):
    first = load_base(config(base))
    copies = [shutil.copytree(base, base.parent / name) for name in ("moved", "again")]
    for copy in copies:
        said: list[str] = []
        assert_same(load_base(config(copy), say=said.append).model, first.model)
        assert len(said) == 1 and "comparing their contents" in said[0] and str(copy) in said[0]
    said.clear()
    for folder in (base, *copies):
        load_base(config(folder), say=said.append)
    assert said == [] and len(entries(cache)) == 1
